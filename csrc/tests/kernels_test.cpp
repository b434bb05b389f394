// Every operation against a plain double implementation, at the sizes where kernels go wrong; for sanitizers.
#include "plain.h"

#include <thread>

namespace {

constexpr int64_t DIMS[] = {8, 24, 64, 80, 96, 128, 256}, GROUPS[] = {1, 3, 4, 7};
constexpr double STEP = 0.9957;

void check_coding(Case& c) {
  sad_call call = c.call;
  call.count = c.length;
  expect(sad_fit(&call) == SAD_OK, "fit fails");
  const size_t moments = size_t(HEADS * c.dim);
  memcpy(c.mean.data + moments, c.mean.data, moments * sizeof(float));
  memcpy(c.deviation.data + moments, c.deviation.data, moments * sizeof(float));
  // in two appends, the second seldom at the start of a block
  call.count = upto(c.length);
  expect(sad_encode(&call) == SAD_OK, "encode fails");
  call.start = call.count, call.keys = c.keys.at(0, 0, call.start, 0), call.count = c.length - call.start;
  if (is_packed(c.type)) call.key_scales += call.start;
  expect(sad_encode(&call) == SAD_OK, "encode fails");
  for (int64_t unit = 0; unit < UNITS; unit++) {
    std::vector<double> sum(size_t(c.dim), 0), square = sum;
    for (int64_t t = 0; t < c.length; t++) {
      const std::vector<double> x = c.rotated_key(unit, t);
      double length = 0, along = 0;
      for (int64_t i = 0; i < c.dim; i++) {
        const double z = (x[i] - c.mean.data[unit * c.dim + i]) / c.deviation.data[unit * c.dim + i];
        const int level = c.level(unit, t, i), wanted = (z >= -STEP) + (z >= 0) + (z >= STEP);
        const bool at_a_cut = std::min(fabs(z), fabs(fabs(z) - STEP)) < 1e-4;
        expect(level == wanted || at_a_cut, "encode: level");
        length += z * z, along += z * (level - 1.5), sum[i] += x[i], square[i] += x[i] * x[i];
      }
      // a key that is the mean itself differs from it by rounding alone
      const double factor = length < 1e-9 ? 0 : std::min(length / std::max(along, 1e-20), 65504.0);
      expect_near(c.factor(unit, t), factor, 1e-3 * factor + 1e-4, "encode: factor");
    }
    const double count = double(std::max<int64_t>(c.length, 1));
    double typical = 0;
    for (int64_t i = 0; i < c.dim; i++)
      typical += (square[i] / count - sum[i] * sum[i] / count / count) / double(c.dim);
    for (int64_t i = 0; unit < HEADS && i < c.dim; i++) {
      const double mean = sum[i] / count, spread = sqrt(std::max(square[i] / count - mean * mean, 1e-4 * typical));
      expect_near(c.mean.data[unit * c.dim + i], mean, 1e-5, "fit: mean");
      expect_near(c.deviation.data[unit * c.dim + i], typical > 1e-9 ? spread : 1, 1e-4, "fit: deviation");
    }
  }
}

void check_score(Case& c) {
  expect(sad_score(&c.call) == SAD_OK, "score fails");
  for (int64_t unit = 0; unit < UNITS; unit++)
    for (int64_t g = 0; g < c.group; g++) {
      std::vector<double> x = c.rotated_query(unit, g);
      double largest = 0, offset = 0, unsure = 0;
      for (int64_t i = 0; i < c.dim; i++) {
        offset += x[i] * c.mean.data[unit * c.dim + i];
        x[i] *= c.deviation.data[unit * c.dim + i];
        largest = std::max(largest, fabs(x[i]));
      }
      // a weight may round either way where it lies between two whole numbers
      for (double& weight : x) {
        weight *= 127 / std::max(largest, 1e-30);
        unsure += fabs(fabs(weight - floor(weight)) - 0.5) < 1e-3;
        weight = nearbyint(weight);
      }
      for (int64_t t = c.low; t < c.high; t++) {
        double along = 0;
        for (int64_t i = 0; i < c.dim; i++) along += x[i] * (c.level(unit, t, i) - 1.5);
        const double slope = c.factor(unit, t) * largest / 127, wanted = c.call.scaling * (along * slope + offset);
        const double found = c.logits.data[(unit * c.group + g) * (c.high - c.low) + t - c.low];
        expect_near(found, wanted, 1e-4 * (1 + fabs(wanted)) + unsure * 1.5 * slope * c.call.scaling, "score");
      }
    }
}

// what must hold of a choice: the best by share, as many as floor, threshold and cap say, in order
void check_choice(const Case& c, const sad_call& call) {
  const int64_t width = c.high - c.low;
  for (int64_t unit = 0; unit < UNITS; unit++) {
    std::vector<double> share(size_t(width), 0), own(size_t(width * c.group), 0);
    std::vector<bool> chosen(size_t(width), false);
    auto counts = [&](int64_t t) { return !call.middle || call.middle[unit / HEADS * width + t]; };
    int64_t eligible = 0, surely = 0, maybe = 0, last = -1;
    for (int64_t t = 0; t < width; t++) eligible += counts(t);
    for (int64_t g = 0; g < c.group; g++) {
      const float* logits = c.logits.data + (unit * c.group + g) * width;
      double total = exp(double(c.near_lse.data[unit * c.group + g]));
      for (int64_t t = 0; t < width; t++) total += counts(t) ? exp(double(logits[t])) : 0;
      for (int64_t t = 0; t < width; t++) own[g * width + t] = counts(t) ? exp(double(logits[t])) / total : 0;
      for (int64_t t = 0; t < width; t++) share[t] += own[g * width + t] / double(c.group);
    }
    for (int64_t t = 0; t < width && call.threshold > 0; t++) {
      surely += counts(t) && share[t] > call.threshold * 1.0001 + 1e-30;
      maybe += counts(t) && share[t] > call.threshold * 0.9999;
    }
    const int64_t wanted = std::min(call.floor, eligible), most = call.cap >= 0 ? call.cap : width;
    const int64_t found = c.counts.data[unit];
    expect(found >= std::min(std::max(wanted, surely), most), "choice: too few");
    expect(found <= std::min(std::max(wanted, maybe), most), "choice: too many");
    double least = INFINITY, best = 0, missing = 0;
    for (int64_t i = 0; i < std::min(found, width); i++) {
      const int64_t t = c.tokens.data[unit * width + i] - c.low;
      expect(t > last && t < width && counts(t), "choice: token");
      if (t <= last || t >= width) return;
      last = t, chosen[t] = true, least = std::min(least, share[t]);
    }
    for (int64_t t = 0; t < width; t++)
      if (!chosen[t] && counts(t)) best = std::max(best, share[t]), missing += share[t];
    expect(least >= best * 0.9999 - 1e-12, "choice: not the best");
    if (eligible) expect_near(c.missing.data[unit], missing, 3e-5, "choice: missing");
    for (int64_t g = 0; g < c.group && eligible; g++) {
      double left = 0;
      for (int64_t t = 0; t < width; t++) left += chosen[t] ? 0 : own[g * width + t];
      expect_near(c.head_missing.data[unit * c.group + g], left, 6e-5 * double(c.group), "choice: missing of a head");
    }
  }
}

using Listed = std::vector<std::vector<int64_t>>;

// of each unit against its list of tokens
void check_attention(const Case& c, const Listed& listed, const char* what) {
  for (int64_t head = 0; head < UNITS * c.group; head++) {
    const int64_t unit = head / c.group, g = head % c.group;
    std::vector<double> logits, output(size_t(c.value_dim), 0), whole = output;
    double top = -INFINITY, total = 0;
    for (int64_t t : listed[unit]) {
      logits.push_back(c.logit(unit, g, t));
      top = std::max(top, logits.back());
    }
    for (size_t n = 0; n < logits.size(); n++) {
      const double weight = exp(logits[n] - top);
      const int64_t t = listed[unit][n], row = unit / HEADS, head = unit % HEADS;
      total += weight;
      for (int64_t i = 0; i < c.value_dim; i++) {
        if (t < c.whole_from) output[i] += weight * c.values.of(row, head, t, i);
        if (t >= c.whole_from) whole[i] += weight * c.whole_values.of(row, head, t - c.whole_from, i);
      }
    }
    output = c.unrotated(output);
    for (int64_t i = 0; i < c.value_dim; i++) output[i] += whole[i];
    expect_near(c.lse.data[head], logits.empty() ? -INFINITY : top + log(total), 1e-4, what);
    for (int64_t i = 0; i < c.value_dim; i++) {
      const char* found = (char*)c.output.data + (head * c.value_dim + i) * (bits_of(c.query_type) / 8);
      const double wanted = logits.empty() ? 0 : output[i] / total;
      // rotated back, packed values grow beyond those that are drawn
      expect_near(get(found, c.query_type), wanted, c.tolerance() * std::max(1.0, fabs(wanted) / 4), what);
    }
  }
}

void check_attend(Case& c) {
  Listed all(UNITS), some(UNITS);
  Block<uint8_t> valid(ROWS * c.length), listed_valid(UNITS * c.length);
  Block<int64_t> tokens(UNITS * c.length);
  sad_call call = c.call;
  call.tokens = nullptr;
  for (int64_t i = 0; i < ROWS * c.length; i++) valid.data[i] = upto(2) > 0;
  for (int64_t unit = 0; unit < UNITS; unit++)
    for (int64_t t = 0; t < c.length; t++) {
      all[unit].push_back(t);
      if (valid.data[unit / HEADS * c.length + t]) some[unit].push_back(t);
    }
  expect(sad_attend(&call) == SAD_OK, "attend fails");
  check_attention(c, all, "attend to all");
  call.middle = valid.data;
  expect(sad_attend(&call) == SAD_OK, "attend fails");
  check_attention(c, some, "attend to the valid");
  call.middle = nullptr, call.tokens = tokens.data, call.tokens_room = c.length, call.tokens_valid = listed_valid.data;
  for (int64_t unit = 0; unit < UNITS; unit++) {
    some[unit].clear();
    for (int64_t i = unit * c.length; i < (unit + 1) * c.length; i++) {
      tokens.data[i] = upto(c.length - 1), listed_valid.data[i] = unit != 1 && upto(2) > 0;
      if (listed_valid.data[i]) some[unit].push_back(tokens.data[i]);
    }
  }
  expect(sad_attend(&call) == SAD_OK, "attend fails");
  check_attention(c, some, "attend to the listed");
  call.tokens_room = 0;
  expect(sad_attend(&call) == SAD_OK, "attend fails");
  check_attention(c, Listed(UNITS), "attend to none");
}

// the heads of a group as so many queries of one head: each gets what it gets alone, to the last bit
void check_verify(Case& c) {
  if (c.length < c.group || is_packed(c.type)) return;
  const int64_t element = c.query_type == SAD_FLOAT32 ? 4 : 2, size = c.value_dim * element;
  sad_call call = c.call;
  call.count = c.group, call.tokens = nullptr, call.middle = nullptr;
  expect(sad_verify(&call) == SAD_OK, "verify fails");
  Block<float> output(UNITS * c.value_dim), lse(UNITS);
  call.group = call.count = 1, call.query_head *= c.group, call.output = output.data, call.lse = lse.data;
  for (int64_t n = 0; n < c.group; n++) {
    call.length = c.length - c.group + 1 + n;
    call.query = static_cast<const char*>(c.call.query) + n * c.call.query_head * element;
    expect(sad_attend(&call) == SAD_OK, "attend fails");
    for (int64_t unit = 0; unit < UNITS; unit++) {
      const char* found = static_cast<const char*>(c.call.output) + (unit * c.group + n) * size;
      expect(!memcmp(found, reinterpret_cast<const char*>(output.data) + unit * size, size_t(size)), "verify: output");
      expect(c.lse.data[unit * c.group + n] == lse.data[unit], "verify: lse");
    }
  }
}

void check_select(Case& c, sad_call call) {
  for (int64_t i = 0; i < UNITS * c.group; i++) c.near_lse.data[i] = upto(9) ? float(number()) : -INFINITY;
  expect(sad_select(&call) == SAD_OK, "select fails");
  check_choice(c, call);
}

void check_step(Case& c, sad_call call) {
  expect(sad_step(&call) >= 0, "step fails");
  Listed read(UNITS);
  for (int64_t unit = 0; unit < UNITS; unit++)
    for (int64_t i = 0; i < call.near_count; i++) {
      const int64_t at = unit / HEADS * call.near_count + i;
      if (!call.near_valid || call.near_valid[at]) read[unit].push_back(call.near[at]);
    }
  // what select is given of the near tokens, and step works out
  for (int64_t head = 0; head < UNITS * c.group; head++) {
    double total = 0;
    for (int64_t t : read[head / c.group]) total += exp(c.logit(head / c.group, head % c.group, t));
    c.near_lse.data[head] = float(log(total));
  }
  check_choice(c, call);
  for (int64_t unit = 0; unit < UNITS; unit++)
    read[unit].insert(read[unit].end(), c.tokens.data + unit * call.tokens_room,
                      c.tokens.data + unit * call.tokens_room + std::min(c.counts.data[unit], call.tokens_room));
  check_attention(c, read, "step");
}

// what is stored of a vector is within half a step of it, rotated
void check_packed(const Case& c, const Tensor& held, const float* rotation, const char* from, int64_t t) {
  const double most = held.type == SAD_INT8 ? 128 : 8;
  for (int64_t unit = 0; unit < UNITS; unit++) {
    std::vector<double> x;
    for (int64_t i = 0; i < held.channels; i++)
      x.push_back(get(from + (unit * held.channels + i) * (bits_of(c.query_type) / 8), c.query_type));
    x = rotated_by(rotation, x);
    const double step = held.step(unit / HEADS, unit % HEADS, t);
    double largest = 0;
    for (double y : x) largest = fabs(y) > fabs(largest) ? y : largest;
    expect_near(fabs(step), fabs(largest) / most, fabs(largest) / most * 1e-3, "pack: scale");
    for (int64_t i = 0; i < held.channels; i++) {
      const double wide = x[i] / step > most - 1 ? 1.1 : 0.51;
      expect_near(held.of(unit / HEADS, unit % HEADS, t, i), x[i], wide * fabs(step) + 1e-6, "pack: step");
    }
  }
}

// a packed token, written by itself and then by a step
void check_packed_append(Case& c) {
  const int64_t element = bits_of(c.query_type) / 8, last = c.length - 1;
  Block<char> key(UNITS * c.dim, element), value(UNITS * c.value_dim, element);
  for (int64_t i = 0; i < UNITS * c.dim; i++) put(key.data + i * element, c.query_type, number());
  for (int64_t i = 0; i < UNITS * c.value_dim; i++) put(value.data + i * element, c.query_type, number());
  sad_call call = c.call;
  call.new_key = key.data, call.start = last, call.count = 1;
  expect(sad_pack(&call) == SAD_OK, "pack fails");
  sad_call other = call;
  other.new_key = value.data, other.dim = c.value_dim, other.rotation = c.value_rotation.data;
  other.keys = c.values.block.data, other.key_row = c.values.row, other.key_head = c.values.head;
  other.key_token = c.values.token, other.key_scales = c.values.scales.data;
  expect(sad_pack(&other) == SAD_OK, "pack fails");
  check_packed(c, c.keys, c.rotation.data, key.data, last);
  check_packed(c, c.values, c.value_rotation.data, value.data, last);
  call.keys = c.keys.at(0, 0, last, 0), call.key_scales += last;
  expect(sad_encode(&call) == SAD_OK, "encode fails");
  const bool whole = last >= c.whole_from;
  auto all = [&] {
    std::string bytes((char*)c.codes.data, size_t(c.codes.count));
    for (const Tensor* x : {&c.keys, &c.values}) {
      bytes.append(x->block.data, size_t(x->block.count * (bits_of(x->type) > 8 ? bits_of(x->type) / 8 : 1)));
      bytes.append((char*)x->scales.data, size_t(x->scales.count * 2));
    }
    return bytes;
  };
  auto spoil = [&](const Tensor& x, int64_t unit, int64_t t) {
    memset(x.at(unit / HEADS, unit % HEADS, t, 0), 0x55, size_t(x.width() * (is_packed(x.type) ? 1 : element)));
    if (is_packed(x.type)) x.scale(unit / HEADS, unit % HEADS, t) = 0x7e00;
  };
  // what is to stay whole is written there alone
  for (int64_t unit = 0; unit < UNITS && whole; unit++)
    for (const Tensor* x : {&c.keys, &c.values}) spoil(*x, unit, last);
  const std::string before = all();
  for (int64_t unit = 0; unit < UNITS; unit++) {
    for (const Tensor* x : {&c.keys, &c.values}) spoil(*x, unit, last);
    for (const Tensor* x : {&c.whole_keys, &c.whole_values})
      if (whole) spoil(*x, unit, last - c.whole_from);
    for (int64_t word = 0; word < c.words; word++)
      memset(c.codes.data + (((unit * c.blocks() + last / 16) * c.words + word) * 16 + last % 16) * 4, 0xff, 4);
  }
  call = c.call;
  call.new_key = key.data, call.new_value = value.data, call.count = 1, call.floor = 5;
  check_step(c, call);
  expect(all() == before, "append: packed");
  for (int64_t unit = 0; unit < UNITS && whole; unit++) {
    const int64_t row = unit / HEADS, head = unit % HEADS, t = last - c.whole_from;
    expect(!memcmp(c.whole_keys.at(row, head, t, 0), key.data + unit * c.dim * element, size_t(c.dim * element)),
           "append: whole key");
    expect(!memcmp(c.whole_values.at(row, head, t, 0), value.data + unit * c.value_dim * element,
                   size_t(c.value_dim * element)), "append: whole value");
  }
}

// the last token taken out of the cache, to come back as the new one
void check_append(Case& c) {
  if (is_packed(c.type)) return check_packed_append(c);
  const int64_t element = c.type == SAD_FLOAT32 ? 4 : 2, last = c.length - 1;
  Block<char> key(UNITS * c.dim, element), value(UNITS * c.value_dim, element);
  const std::string codes((char*)c.codes.data, size_t(c.codes.count));
  auto take = [&](const Tensor& x, int64_t unit, char* to) {
    char* from = x.at(unit / HEADS, unit % HEADS, last, 0);
    memcpy(to + unit * x.channels * element, from, size_t(x.channels * element));
    memset(from, 0xff, size_t(x.channels * element));
  };
  for (int64_t unit = 0; unit < UNITS; unit++) {
    take(c.keys, unit, key.data);
    take(c.values, unit, value.data);
    for (int64_t word = 0; word < c.words; word++)
      memset(c.codes.data + (((unit * c.blocks() + last / 16) * c.words + word) * 16 + last % 16) * 4, 0xff, 4);
  }
  sad_call call = c.call;
  call.new_key = key.data, call.new_value = value.data, call.count = 1, call.floor = 5;
  check_step(c, call);
  expect(!memcmp(c.codes.data, codes.data(), codes.size()), "append: codes");
}

void check(Case& c) {
  const int64_t width = c.high - c.low;
  check_coding(c);
  check_attend(c);
  check_verify(c);
  check_score(c);
  for (int64_t i = 0; i < c.middle.count; i++) c.middle.data[i] = upto(2) > 0 && c.length % 7;
  for (int64_t i = 0; i < c.near_valid.count; i++) c.near_valid.data[i] = upto(3) > 0;
  for (int64_t round = 0; round < 4; round++) {
    sad_call call = c.call;
    call.floor = round == 0 ? c.length + 9 : upto(width), call.threshold = round % 2 ? 0.5 / double(width + 1) : 0;
    call.middle = round > 1 ? c.middle.data : nullptr, call.near_valid = round > 2 ? c.near_valid.data : nullptr;
    check_step(c, call);
    if (!width) continue;
    check_select(c, call);
    call.cap = 1 + upto(width);
    check_select(c, call);
  }
  if (c.low + 1 < c.length && c.high < c.length) check_append(c);
}

// no number is right: only that nothing is read or written where it must not be
void check_poisoned(Case& c) {
  const double bad[] = {INFINITY, -INFINITY, NAN};
  for (int64_t unit = 0; unit < UNITS && c.length; unit++)
    for (int64_t n = 0; n < 3; n++) {
      const int64_t row = unit / HEADS, head = unit % HEADS, t = upto(c.length - 1);
      if (is_packed(c.type)) {
        put((char*)&c.keys.scale(row, head, t), SAD_FLOAT16, bad[upto(2)]);
      } else {
        put(c.keys.at(row, head, t, upto(c.dim - 1)), c.type, bad[upto(2)]);
      }
    }
  for (int64_t round = 0; round < 4; round++) {
    sad_call call = c.call;
    call.floor = upto(c.length), call.threshold = round % 2 ? 1e-3 : 0, call.count = c.length;
    // first with the statistics of sound keys, then of these
    int status = round > 1 ? sad_fit(&call) : SAD_OK;
    status |= sad_encode(&call) | sad_score(&call) | (sad_step(&call) < 0);
    for (int64_t select = 0; select < 2; select++) {
      for (int64_t unit = 0; unit < UNITS; unit++) {
        expect(c.counts.data[unit] >= 0 && c.counts.data[unit] <= call.tokens_room, "poisoned: count");
        for (int64_t i = 0; i < std::min(c.counts.data[unit], call.tokens_room); i++) {
          const int64_t t = c.tokens.data[unit * call.tokens_room + i];
          expect(t >= c.low && t < c.high, "poisoned: token");
        }
      }
      call.cap = 1 + upto(9);
      for (int64_t i = 0; i < UNITS * c.group; i++) c.near_lse.data[i] = upto(1) ? NAN : INFINITY;
      if (c.high > c.low) status |= sad_select(&call);
    }
    expect(status == SAD_OK, "poisoned: fails");
  }
}

int32_t parallel_for(int64_t begin, int64_t end, int64_t, void (*work)(int64_t, int64_t, void*), void* context) {
  std::vector<std::thread> threads;
  for (int64_t i = begin; i < end; i++) threads.emplace_back(work, i, i + 1, context);
  for (std::thread& thread : threads) thread.join();
  return 0;
}

void run(int64_t type, int64_t length, int64_t group, int64_t dim, int64_t value_dim, int64_t threads) {
  about = std::string(sad_isa()) + " type " + std::to_string(type) + " length " + std::to_string(length) + " group " +
          std::to_string(group) + " dim " + std::to_string(dim) + " value_dim " + std::to_string(value_dim);
  Case c(type, length, group, dim, value_dim, threads);
  check(c);
  check_poisoned(c);
}

}  // namespace

int main() {
  for (const char* isa : {"portable", "avx2", "avx512"}) {
    if (!sad_use_isa(isa)) {
      printf("%s: not on this machine\n", isa);
      continue;
    }
    sad_use_threads(nullptr);
    // every length, each with a quarter of the dims; every dim meets every dtype and group
    for (int64_t length = 0; length <= 130; length++)
      for (int64_t i = length % 4; i < 7; i += 4) {
        const int64_t turn = (length + i) / 4;
        run(turn % 5, length, GROUPS[turn % 4], DIMS[i], DIMS[(i + turn) % 7], 1);
      }
    // enough to be cut into pieces, and to be shared out
    sad_use_threads(parallel_for);
    for (int64_t type = 0; type < 5; type++) run(type, 4700 + 7 * type, GROUPS[type % 3 + 1], 64, 80, 3);
    printf("%s: %s\n", isa, failures ? "failed" : "passed");
  }
  return failures != 0;
}
