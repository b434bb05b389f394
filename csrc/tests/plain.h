// Data of one cache, laid out so that sanitizers see every wrong step, and what is read from it in double.
#ifndef SAD_TESTS_PLAIN_H
#define SAD_TESTS_PLAIN_H

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <algorithm>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../sparse_decode.h"

namespace {

constexpr int64_t ROWS = 2, HEADS = 2, UNITS = ROWS * HEADS;

std::mt19937 generator(1);
std::string about;
int failures = 0;

void expect(bool holds, const char* what) {
  if (!holds && failures++ < 20) fprintf(stderr, "%s: %s\n", about.c_str(), what);
}
void expect_near(double found, double wanted, double tolerance, const char* what) {
  const bool same = found == wanted || fabs(found - wanted) <= tolerance;
  if (!same && failures < 20) fprintf(stderr, "found %.9g, wanted %.9g\n", found, wanted);
  expect(same, what);
}

int64_t upto(int64_t most) { return int64_t(generator() % uint64_t(most + 1)); }
// exact in every dtype
double number() { return double(upto(254) - 127) / 32; }

void put(char* to, int64_t type, double x) {
  const float single = float(x);
  uint32_t bits;
  memcpy(&bits, &single, 4);
  if (type == SAD_FLOAT32) {
    memcpy(to, &bits, 4);
    return;
  }
  uint16_t half = uint16_t(bits >> 16);
  if (type == SAD_FLOAT16) {
    const uint32_t size = bits & 0x7fffffff;
    half = uint16_t((half & 0x8000) | (x == 0 ? 0 : isnan(x) ? 0x7e00 : isinf(x) ? 0x7c00 : (size - 0x38000000) >> 13));
  }
  memcpy(to, &half, 2);
}

inline bool is_packed(int64_t type) { return type >= SAD_INT8; }
// bits of a stored channel, and the dtype of queries, outputs and new tokens beside a cache of this type
inline int64_t bits_of(int64_t type) { return type == SAD_FLOAT32 ? 32 : type == SAD_INT8 ? 8 : type == SAD_INT4 ? 4 : 16; }
inline int64_t query_type_of(int64_t type, int64_t length) { return is_packed(type) ? length % 3 : type; }

double get(const char* from, int64_t type) {
  uint32_t bits = 0;
  float single;
  memcpy(&bits, from, type == SAD_FLOAT32 ? 4 : 2);
  if (type == SAD_FLOAT16) {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const double size = exponent == 31 ? (fraction ? NAN : INFINITY)
                                       : ldexp(fraction + (exponent ? 1024 : 0), std::max(exponent, 1) - 25);
    return bits & 0x8000 ? -size : size;
  }
  if (type == SAD_BFLOAT16) bits <<= 16;
  memcpy(&single, &bits, 4);
  return single;
}

// Elements that end where their allocation ends and begin one behind its start: overreads show, and nothing
// is aligned to more than an element. NaN, or -1, before it is written.
template <class T>
struct Block {
  int64_t count;
  std::unique_ptr<char[]> memory;
  T* data;

  explicit Block(int64_t count, int64_t element = sizeof(T))
      : count(count), memory(new char[size_t((count + 1) * element)]), data((T*)(memory.get() + element)) {
    memset(memory.get(), 0xff, size_t((count + 1) * element));
  }
};

// [rows, heads, tokens, channels] with gaps of NaN behind each token, head and row; strides count elements, where packed
// bytes
struct Tensor {
  int64_t type, heads, tokens, channels, token, head, row;
  Block<char> block;
  Block<uint16_t> scales;

  Tensor(int64_t type, int64_t heads, int64_t tokens, int64_t channels, int64_t gap)
      : type(type), heads(heads), tokens(tokens), channels(channels), token(width() + gap),
        head(tokens * token + 2 * gap), row(heads * head + gap),
        block(tokens ? (ROWS - 1) * row + (heads - 1) * head + (tokens - 1) * token + width() : 0,
              is_packed(type) ? 1 : bits_of(type) / 8),
        scales(is_packed(type) ? ROWS * heads * tokens : 0) {
    for (int64_t r = 0; r < ROWS; r++)
      for (int64_t h = 0; h < heads; h++)
        for (int64_t t = 0; t < tokens; t++) {
          // powers of two of either sign, exact in float16
          if (is_packed(type)) scale(r, h, t) = uint16_t(((type == SAD_INT8 ? 9 : 13) + upto(1)) << 10 | upto(1) << 15);
          for (int64_t i = 0; i < channels; i++)
            if (is_packed(type)) {
              *at(r, h, t, i) = char(upto(255));
            } else {
              put(at(r, h, t, i), type, number());
            }
        }
  }
  int64_t width() const { return type == SAD_INT4 ? channels / 2 : channels; }
  char* at(int64_t r, int64_t h, int64_t t, int64_t i) const {
    const int64_t element = is_packed(type) ? 1 : bits_of(type) / 8;
    return block.data + (r * row + h * head + t * token + (type == SAD_INT4 ? i / 2 : i)) * element;
  }
  uint16_t& scale(int64_t r, int64_t h, int64_t t) const { return scales.data[(r * heads + h) * tokens + t]; }
  double step(int64_t r, int64_t h, int64_t t) const { return get((char*)&scale(r, h, t), SAD_FLOAT16); }
  // of a packed row a rotated channel
  double of(int64_t r, int64_t h, int64_t t, int64_t i) const {
    if (type == SAD_INT8) return double(*(int8_t*)at(r, h, t, i)) * step(r, h, t);
    if (type == SAD_INT4) return double((*(uint8_t*)at(r, h, t, i) >> (i % 2 * 4) & 15) - 8) * step(r, h, t);
    return get(at(r, h, t, i), type);
  }
};

// what sad_call knows of a rotation: scale, signs, cosines
inline std::vector<float> new_rotation(int64_t dim) {
  const int64_t power = dim & -dim, odd = dim / power;
  std::vector<float> rotation{float(1 / sqrt(double(power)))};
  for (int64_t i = 0; i < dim; i++) rotation.push_back(float(2 * upto(1) - 1));
  for (int64_t i = 0; i < odd * odd; i++)
    rotation.push_back(float(cos(double(i / odd) * (double(i % odd) + 0.5) * M_PI / double(odd)) *
                             sqrt((i < odd ? 1.0 : 2.0) / double(odd))));
  return rotation;
}
// signs, then the Hadamard matrix within each block, then cosines between blocks
inline std::vector<double> rotated_by(const float* rotation, std::vector<double> x) {
  const int64_t dim = int64_t(x.size()), power = dim & -dim, odd = dim / power;
  std::vector<double> y(size_t(dim), 0);
  for (int64_t i = 0; i < dim; i++) x[i] *= rotation[1 + i] / sqrt(double(power));
  for (int64_t half = 1; half < power; half *= 2)
    for (int64_t i = 0; i < dim; i++)
      if (!(i & half)) {
        const double first = x[i], second = x[i + half];
        x[i] = first + second, x[i + half] = first - second;
      }
  for (int64_t i = 0; i < dim; i++)
    for (int64_t part = 0; part < odd; part++)
      y[i] += rotation[1 + dim + i / power * odd + part] * x[part * power + i % power];
  return y;
}

// one cache of one size, and the call that all operations start from
struct Case {
  int64_t type, query_type, length, group, dim, value_dim, words, low, high, whole_from;
  Tensor query, keys, values, whole_keys, whole_values;
  Block<uint8_t> codes, middle, near_valid;
  Block<uint16_t> factors;
  Block<float> mean, deviation, rotation, value_rotation, output, lse, logits, near_lse, missing, head_missing;
  Block<int64_t> near, tokens, counts;
  sad_call call = {};

  Case(int64_t type, int64_t length, int64_t group, int64_t dim, int64_t value_dim, int64_t threads)
      : type(type), query_type(query_type_of(type, length)), length(length), group(group), dim(dim), value_dim(value_dim), words((dim + 15) / 16),
        low(std::min<int64_t>(length, length % 20)), high(std::max(low, length - 1 - length % 3)),
        whole_from(is_packed(type) && length % 4 ? length - upto(std::min<int64_t>(length, 130)) : length),
        query(query_type, 1, HEADS * group, dim, 1), keys(type, HEADS, length, dim, length % 2 ? 3 : 0),
        values(type, HEADS, length, value_dim, length % 2 ? 5 : 0),
        whole_keys(query_type, HEADS, length - whole_from, dim, length % 2 ? 3 : 0),
        whole_values(query_type, HEADS, length - whole_from, value_dim, length % 2 ? 5 : 0), codes(UNITS * blocks() * words * 64),
        middle(ROWS * (high - low)), near_valid(ROWS * (length - high + low)), factors(UNITS * blocks() * 16),
        mean(UNITS * dim), deviation(UNITS * dim), rotation(1 + dim + odd(dim) * odd(dim)),
        value_rotation(1 + value_dim + odd(value_dim) * odd(value_dim)),
        output(UNITS * group * value_dim, bits_of(query_type) / 8), lse(UNITS * group),
        logits(UNITS * group * (high - low)), near_lse(UNITS * group), missing(UNITS), head_missing(UNITS * group),
        near(ROWS * (length - high + low)), tokens(UNITS * (high - low)), counts(UNITS) {
    const int64_t beside = length - high + low;
    const std::vector<float> turn = new_rotation(dim), other = new_rotation(value_dim);
    std::copy(turn.begin(), turn.end(), rotation.data);
    std::copy(other.begin(), other.end(), value_rotation.data);
    for (int64_t i = 0; i < ROWS * beside; i++) near.data[i] = i % beside < low ? i % beside : i % beside - low + high;
    call.batch = ROWS, call.kv_heads = HEADS, call.group = group, call.dim = dim, call.value_dim = value_dim;
    call.threads = threads, call.cache_type = type, call.query_type = query_type, call.length = length;
    call.scaling = 1 / sqrt(double(dim));
    call.query = query.block.data, call.query_row = query.row, call.query_head = query.token;
    call.output = output.data, call.lse = lse.data, call.rotation = rotation.data;
    call.keys = keys.block.data, call.key_row = keys.row, call.key_head = keys.head, call.key_token = keys.token;
    call.values = values.block.data, call.value_row = values.row, call.value_head = values.head;
    call.value_token = values.token, call.codes = codes.data, call.code_head = blocks() * words * 64;
    call.code_row = HEADS * call.code_head, call.factors = factors.data, call.factor_head = blocks() * 16;
    call.factor_row = HEADS * call.factor_head, call.mean = mean.data, call.deviation = deviation.data;
    call.key_scales = keys.scales.data, call.key_scale_head = length, call.key_scale_row = HEADS * length;
    call.value_scales = values.scales.data, call.value_scale_head = length, call.value_scale_row = HEADS * length;
    call.value_rotation = value_rotation.data, call.whole_from = whole_from;
    call.whole_keys = whole_keys.block.data, call.whole_key_row = whole_keys.row, call.whole_key_head = whole_keys.head;
    call.whole_key_token = whole_keys.token, call.whole_values = whole_values.block.data;
    call.whole_value_row = whole_values.row, call.whole_value_head = whole_values.head;
    call.whole_value_token = whole_values.token;
    call.near = near.data, call.near_count = beside, call.low = low, call.high = high;
    call.logits = logits.data, call.near_lse = near_lse.data, call.tokens = tokens.data;
    call.cap = -1, call.tokens_room = high - low, call.counts = counts.data, call.missing = missing.data;
    call.head_missing = head_missing.data;
  }
  static int64_t odd(int64_t dim) { return dim / (dim & -dim); }
  int64_t blocks() const { return (length + 15) / 16; }
  // what rounding may do to an output
  double tolerance() const { return query_type == SAD_FLOAT32 ? 2e-5 : query_type == SAD_FLOAT16 ? 2e-3 : 1.6e-2; }
  // two bits of a code, and the factor of a token
  int level(int64_t unit, int64_t t, int64_t i) const {
    const int64_t byte = i % (4 * words), block = (unit * blocks() + t / 16) * words;
    return codes.data[((block + byte / 4) * 16 + t % 16) * 4 + byte % 4] >> (2 * (i / (4 * words))) & 3;
  }
  double factor(int64_t unit, int64_t t) const {
    return get((char*)(factors.data + unit * blocks() * 16 + t), SAD_FLOAT16);
  }

  std::vector<double> rotated_key(int64_t unit, int64_t t) const {
    std::vector<double> x;
    for (int64_t i = 0; i < dim; i++) x.push_back(keys.of(unit / HEADS, unit % HEADS, t, i));
    return is_packed(type) ? x : rotated_by(rotation.data, x);
  }
  std::vector<double> rotated_query(int64_t unit, int64_t g) const {
    std::vector<double> x;
    for (int64_t i = 0; i < dim; i++) x.push_back(query.of(unit / HEADS, 0, unit % HEADS * group + g, i));
    return rotated_by(rotation.data, x);
  }
  double logit(int64_t unit, int64_t g, int64_t t) const {
    double dot = 0;
    if (is_packed(type) && t < whole_from) {
      const std::vector<double>& asked = turned_query(unit, g);
      for (int64_t i = 0; i < dim; i++) dot += asked[i] * keys.of(unit / HEADS, unit % HEADS, t, i);
      return dot * call.scaling;
    }
    for (int64_t i = 0; i < dim; i++)
      dot += query.of(unit / HEADS, 0, unit % HEADS * group + g, i) *
             (t < whole_from ? keys : whole_keys).of(unit / HEADS, unit % HEADS, t < whole_from ? t : t - whole_from, i);
    return dot * call.scaling;
  }
  // kept: it is asked for with every token
  const std::vector<double>& turned_query(int64_t unit, int64_t g) const {
    if (turned.empty()) turned.resize(size_t(UNITS * group));
    std::vector<double>& x = turned[unit * group + g];
    if (x.empty()) x = rotated_query(unit, g);
    return x;
  }
  mutable std::vector<std::vector<double>> turned;
  // sums of values as they should come out: those of packed ones rotated back, by the transposed rotation
  std::vector<double> unrotated(const std::vector<double>& sums) const {
    if (!is_packed(type)) return sums;
    std::vector<double> x(size_t(value_dim), 0);
    for (int64_t i = 0; i < value_dim; i++) {
      std::vector<double> unit(size_t(value_dim), 0);
      unit[i] = 1;
      unit = rotated_by(value_rotation.data, unit);
      for (int64_t j = 0; j < value_dim; j++) x[i] += unit[j] * sums[j];
    }
    return x;
  }
};

}  // namespace
#endif
