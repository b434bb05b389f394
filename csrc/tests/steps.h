// Choosing and attending, the step that does both, and the token that it appends: what must hold of them.
#ifndef SAD_TESTS_STEPS_H
#define SAD_TESTS_STEPS_H

#include "plain.h"

namespace {

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

}  // namespace
#endif
