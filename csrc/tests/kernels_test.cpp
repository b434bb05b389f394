// Every operation against a plain double implementation, at the sizes where kernels go wrong; for sanitizers.
#include "products.h"
#include "steps.h"

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
    for (int64_t threads : {1, 3}) check_products(threads);
    printf("%s: %s\n", isa, failures ? "failed" : "passed");
  }
  return failures != 0;
}
