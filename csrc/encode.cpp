// Coding: two bits a channel and one factor a token for keys, eight bits a channel for queries. Compiled
// without contraction to fused multiply-adds: codes and weights equal those of the PyTorch definition,
// whatever the instruction set.
#include "kernels.h"
#include "parallel.h"
#include "rotate.h"

namespace {

// step of the best uniform 2-bit quantiser of a unit normal
constexpr float STEP = 0.9957f;
constexpr float LARGEST_FACTOR = 65504.0f;

template <class T>
const T* key_at(const sad_call* c, int64_t row, int64_t head, int64_t token) {
  return static_cast<const T*>(c->keys) + row * c->key_row + head * c->key_head + token * c->key_token;
}

// the key of a token, rotated: a packed one is kept so
template <class T>
void rotated_key(const sad_call* c, int64_t row, int64_t head, int64_t token, float* to) {
  const T* key = key_at<T>(c, row, head, token);
  if constexpr (is_packed<T>) {
    const float scale = widen(f16{c->key_scales[row * c->key_scale_row + head * c->key_scale_head + token]});
    for (int i = 0; i < c->dim; i++) to[i] = step_of(key, i) * scale;
  } else {
    rotated(c, key, to);
  }
}

// z = (rotated - mean) / deviation -> codes of one token; returns its factor
inline float code_token(const float* z, uint8_t* block, int lane, int dim) {
  const int words = (dim + 15) / 16, width = 4 * words;
  uint8_t packed[SAD_MOST_DIM / 4 + 4] = {};
  float square = 0, along = 0;
  for (int i = 0; i < dim; i++) {
    const int level = (z[i] >= -STEP) + (z[i] >= 0) + (z[i] >= STEP);
    packed[i % width] |= uint8_t(level << (2 * (i / width)));
    square += z[i] * z[i];
    along += z[i] * (float(level) - 1.5f);
  }
  for (int word = 0; word < words; word++) memcpy(block + (word * 16 + lane) * 4, packed + 4 * word, 4);
  const float factor = square / (along > 1e-20f ? along : 1e-20f);
  return factor > LARGEST_FACTOR ? LARGEST_FACTOR : factor;
}

template <class T>
void encode_head(const sad_call* c, int64_t row, int64_t head) {
  const int dim = int(c->dim), words = (dim + 15) / 16;
  const int64_t unit = row * c->kv_heads + head;
  const float *mean = c->mean + unit * dim, *deviation = c->deviation + unit * dim;
  uint8_t* codes = c->codes + row * c->code_row + head * c->code_head;
  uint16_t* factors = c->factors + row * c->factor_row + head * c->factor_head;
  for (int64_t n = 0; n < c->count; n++) {
    float z[SAD_MOST_DIM];
    rotated_key<T>(c, row, head, n, z);
    for (int i = 0; i < dim; i++) z[i] = (z[i] - mean[i]) / deviation[i];
    const int64_t token = c->start + n;
    const float factor = code_token(z, codes + token / 16 * (words * 64), int(token % 16), dim);
    f16 half;
    narrow(factor, &half);
    factors[token] = half.bits;
  }
}

template <class T>
int encode_all(const sad_call* c) {
  const int64_t units = c->batch * c->kv_heads;
  // long appends are cut so that heads need not divide by threads; a block belongs to one item
  const int64_t piece = 512, lead = (16 - c->start % 16) % 16;
  const int64_t pieces = c->count <= lead ? 1 : 1 + (c->count - lead + piece - 1) / piece;
  each(units * c->count < 64 ? 1 : c->threads, units * pieces, [&](int64_t item) {
    const int64_t unit = item / pieces, part = item % pieces;
    sad_call own = *c;
    const int64_t from = part == 0 ? 0 : lead + (part - 1) * piece;
    const int64_t to = part == 0 ? (lead < c->count ? lead : c->count) : from + piece;
    own.start = c->start + from;
    own.count = (to < c->count ? to : c->count) - from;
    own.keys = const_cast<T*>(key_at<T>(c, 0, 0, from));
    if (is_packed<T>) own.key_scales = c->key_scales + from;
    encode_head<T>(&own, unit / c->kv_heads, unit % c->kv_heads);
  });
  return SAD_OK;
}

template <class T>
void fit_head(const sad_call* c, int64_t head) {
  const int dim = int(c->dim);
  double sum[SAD_MOST_DIM] = {}, square[SAD_MOST_DIM] = {};
  float x[SAD_MOST_DIM];
  for (int64_t n = 0; n < c->count; n++) {
    rotated_key<T>(c, 0, head, n, x);
    for (int i = 0; i < dim; i++) {
      sum[i] += x[i];
      square[i] += double(x[i]) * x[i];
    }
  }
  float *mean = c->mean + head * dim, *deviation = c->deviation + head * dim;
  double typical = 0, variance[SAD_MOST_DIM];
  const double count = double(c->count > 0 ? c->count : 1);
  for (int i = 0; i < dim; i++) {
    const double m = sum[i] / count, v = square[i] / count - m * m;
    // rounding may leave a channel that never varied with a variance of a few last places, below 0 too
    variance[i] = v > 1e-13 * m * m ? v : (v == v ? 0 : v);
    typical += variance[i] / dim;
    mean[i] = float(m);
  }
  // a channel that has not varied yet still needs a scale for the keys to come
  const double least = 0.01 * sqrt(typical);
  for (int i = 0; i < dim; i++) {
    const double spread = sqrt(variance[i]);
    deviation[i] = typical > 0 ? float(spread > least ? spread : least) : 1.0f;
  }
}

template <class T>
int fit_all(const sad_call* c) {
  each(c->count < 64 ? 1 : c->threads, c->kv_heads, [&](int64_t head) { fit_head<T>(c, head); });
  return SAD_OK;
}

inline float steps_below_zero(const i8*) { return 128; }
inline float steps_below_zero(const i4*) { return 8; }
inline void write_step(i8* row, int i, int step) { row[i].step = int8_t(step); }
inline void write_step(i4* row, int i, int step) {
  // the even channel comes first, and clears the byte
  const int half = step + 8;
  row[i / 2].pair = uint8_t(i % 2 ? row[i / 2].pair | half << 4 : half);
}

// Writes the steps of a rotated vector; returns its scale. See kernels/packed.py.
template <class T>
uint16_t pack_row(const float* x, int dim, T* to) {
  const float most = steps_below_zero(to);
  float largest = 0;
  bool sound = true;
  for (int i = 0; i < dim; i++) {
    sound &= x[i] == x[i];
    if (fabsf(x[i]) > fabsf(largest)) largest = x[i];
  }
  f16 scale;
  // a power of two: as exact as it is in any order
  narrow(sound ? largest / -most : NAN, &scale);
  const float size = widen(scale);
  const bool plain = size != 0 && size - size == 0;
  for (int i = 0; i < dim; i++) {
    const float step = plain ? rintf(x[i] / size) : 0;
    const int whole = int(step < -most ? -most : step > most - 1 ? most - 1 : step);
    write_step(to, i, whole);
  }
  return scale.bits;
}

template <class T, class Q>
int pack_all(const sad_call* c) {
  const int64_t units = c->batch * c->kv_heads, piece = 64, pieces = (c->count + piece - 1) / piece;
  each(units * c->count < 64 ? 1 : c->threads, units * pieces, [&](int64_t item) {
    const int64_t unit = item / pieces, row = unit / c->kv_heads, head = unit % c->kv_heads;
    const int64_t end = (item % pieces + 1) * piece;
    for (int64_t n = item % pieces * piece; n < end && n < c->count; n++) {
      float x[SAD_MOST_DIM];
      rotated(c, static_cast<const Q*>(c->new_key) + (unit * c->count + n) * c->dim, x);
      T* to = const_cast<T*>(key_at<T>(c, row, head, c->start + n));
      c->key_scales[row * c->key_scale_row + head * c->key_scale_head + c->start + n] = pack_row(x, int(c->dim), to);
    }
  });
  return SAD_OK;
}

template <class T>
int pack_as(const sad_call* c) {
  if (c->query_type == SAD_BFLOAT16) return pack_all<T, bf16>(c);
  if (c->query_type == SAD_FLOAT16) return pack_all<T, f16>(c);
  return pack_all<T, float>(c);
}

template <class Q>
void weigh_group(const sad_call* c, int64_t unit, sad_weights* weights) {
  const int dim = int(c->dim), words = (dim + 15) / 16, width = 4 * words;
  const float *mean = c->mean + unit * dim, *deviation = c->deviation + unit * dim;
  const Q* query = static_cast<const Q*>(c->query) + unit / c->kv_heads * c->query_row +
                   unit % c->kv_heads * c->group * c->query_head;
  for (int64_t g = 0; g < c->group; g++) {
    sad_weights* w = weights + g;
    float x[SAD_MOST_DIM], largest = 0, along_mean = 0;
    rotated(c, query + g * c->query_head, x);
    for (int i = 0; i < dim; i++) {
      along_mean += x[i] * mean[i];
      x[i] *= deviation[i];
      largest = fabsf(x[i]) > largest ? fabsf(x[i]) : largest;
    }
    const float step = largest / 127.0f;
    int32_t total = 0;
    memset(w->of, 0, size_t(words) * 16);
    for (int i = 0; i < dim; i++) {
      const int byte = i % width, plane = i / width;
      const float whole = step > 0 ? rintf(x[i] / step) : 0;
      // NaN and infinity weigh 0: they reach the logit through `mean_logit`
      const int8_t weight = whole >= -127 && whole <= 127 ? int8_t(whole) : 0;
      w->of[(byte / 4 * 4 + plane) * 4 + byte % 4] = weight;
      total += weight;
    }
    w->offset = 3 * total;
    w->slope = 0.5f * step * float(c->scaling);
    w->mean_logit = along_mean * float(c->scaling);
  }
}

}  // namespace

void SAD_NAMED(weigh)(const sad_call* c, int64_t unit, sad_weights* weights) {
  if (c->query_type == SAD_BFLOAT16) return weigh_group<bf16>(c, unit, weights);
  if (c->query_type == SAD_FLOAT16) return weigh_group<f16>(c, unit, weights);
  return weigh_group<float>(c, unit, weights);
}

#define SAD_BY_CACHE(op)                                   \
  if (c->cache_type == SAD_INT4) return op<i4>(c);         \
  if (c->cache_type == SAD_INT8) return op<i8>(c);         \
  if (c->cache_type == SAD_BFLOAT16) return op<bf16>(c);   \
  if (c->cache_type == SAD_FLOAT16) return op<f16>(c);     \
  return op<float>(c);

int SAD_NAMED(encode)(const sad_call* c) { SAD_BY_CACHE(encode_all) }
int SAD_NAMED(fit)(const sad_call* c) { SAD_BY_CACHE(fit_all) }
int SAD_NAMED(pack)(const sad_call* c) { return c->cache_type == SAD_INT4 ? pack_as<i4>(c) : pack_as<i8>(c); }
