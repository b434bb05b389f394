// Attention over a list of tokens: online softmax in tiles, one KV head and its group of query heads at a time.
#ifndef SAD_SOFTMAX_H
#define SAD_SOFTMAX_H

#include "simd.h"

namespace {

// tokens whose logits are held at once, while the rows of as many more are fetched
constexpr int TILE = 64;
// query heads that share one pass over a row; with as many accumulators as registers allow
constexpr int SHARED = NW == 16 ? 4 : 2;

// Part of an attention: sum of e^(logit - top) and that sum's values, for each head of the group.
// A part lies in scratch as [G] top, [G] total, [G][Dv'] values, Dv' being `lanes(Dv)`.
struct Part {
  float *top, *total, *values;
};
inline int64_t lanes(int64_t dim) { return (dim + PAIR - 1) / PAIR * PAIR; }
inline int64_t part_size(int64_t group, int64_t value_dim) { return group * (2 + lanes(value_dim)) + 64; }
inline Part part_at(float* scratch, int64_t group) { return {scratch, scratch + group, scratch + 2 * group}; }

// Rows [T, channels] of one head, `stride` stored elements apart, and the scales of packed ones.
template <class T>
struct Held {
  const T* rows;
  int64_t stride;
  const uint16_t* scales;
};

// Rows of one tile, a null behind the last; with their scales where they are packed.
template <class T>
struct Tile {
  const T* row[TILE + 1];
  float scale[TILE];
  // what is added to each token's logits, or null
  const float* log_weights = nullptr;

  void add(int n, Held<T> held, int64_t token) {
    row[n] = held.rows + token * held.stride;
    if constexpr (is_packed<T>) scale[n] = widen(f16{held.scales[token]});
  }
  void pad(int from, int to) {
    for (int t = from; t < to; t++) row[t] = row[from - 1];
    if constexpr (is_packed<T>)
      for (int t = from; t < TILE; t++) scale[t] = 0;
  }
  // per token, not per channel
  void rescale(float* numbers) const {
    if constexpr (is_packed<T>)
      for (int t = 0; t < TILE; t += NW) store(numbers + t, load(numbers + t) * load(scale + t));
  }
};

// Rows of the next tile, fetched while this one is worked on: pointers up to a null, or none.
template <class T>
struct Next {
  const T* const* rows;
  int bytes;

  void fetch() {
    if (!rows) return;
    if (*rows) {
      prefetch_row(*rows++, bytes);
    } else {
      rows = nullptr;
    }
  }
};

// logits[g][t] of `count` rows, count a multiple of 4
template <class T, int G>
void dots(const T* const* keys, int count, Next<T> next, const float* query, int dim, float scaling, float* logits) {
  const int64_t width = lanes(dim);
  const int whole = dim / PAIR * PAIR, rest = dim - whole;
  for (int t = 0; t < count; t += 4) {
    F sum[4][G];
    UNROLL for (int k = 0; k < 4; k++) {
      next.fetch();
      UNROLL for (int g = 0; g < G; g++) sum[k][g] = F{};
    }
    auto add = [&](int i, Pair (*read)(const T*, int)) __attribute__((always_inline)) {
      F qa[G], qb[G];
      UNROLL for (int g = 0; g < G; g++) {
        qa[g] = load(query + g * width + i);
        qb[g] = load(query + g * width + i + NW);
      }
      UNROLL for (int k = 0; k < 4; k++) {
        const Pair key = read(at(keys[t + k], i), rest);
        UNROLL for (int g = 0; g < G; g++) {
          sum[k][g] += key.a * qa[g];
          sum[k][g] += key.b * qb[g];
        }
      }
    };
    for (int i = 0; i < whole; i += PAIR) add(i, [](const T* p, int) { return load_pair(p); });
    if (rest) add(whole, [](const T* p, int n) { return load_rest(p, n); });
    UNROLL for (int g = 0; g < G; g++) {
      const Sums four = sum_each(sum[0][g], sum[1][g], sum[2][g], sum[3][g]);
      for (int k = 0; k < 4; k++) logits[g * TILE + t + k] = four.of[k] * scaling;
    }
  }
}

// values[g][i] += weight[g][t] * row[t][i] for the N pairs from element `from` on
template <class T, int G, int N>
inline void blend(const T* const* rows, int count, const float* weights, int64_t width, int from, int rest,
                  Next<T> next, float* values) {
  F sum[G][2 * N];
  UNROLL for (int g = 0; g < G; g++)
    UNROLL for (int n = 0; n < 2 * N; n++) sum[g][n] = load(values + g * width + from + n * NW);
  for (int t = 0; t < count; t++) {
    next.fetch();
    UNROLL for (int n = 0; n < N; n++) {
      const Pair row = rest ? load_rest(at(rows[t], from), rest) : load_pair(at(rows[t], from + n * PAIR));
      UNROLL for (int g = 0; g < G; g++) {
        const F weight = splat(weights[g * TILE + t]);
        sum[g][2 * n] += row.a * weight;
        sum[g][2 * n + 1] += row.b * weight;
      }
    }
  }
  UNROLL for (int g = 0; g < G; g++)
    UNROLL for (int n = 0; n < 2 * N; n++) store(values + g * width + from + n * NW, sum[g][n]);
}

template <class T, int G>
void blend_row(const T* const* rows, int count, const float* weights, int dim, Next<T> next, float* values) {
  const int64_t width = lanes(dim);
  const int whole = dim / PAIR * PAIR;
  for (int at = 0; at < whole;) {
    const int pairs = at + 2 * PAIR <= whole ? 2 : 1;
    if (pairs == 2) blend<T, G, 2>(rows, count, weights, width, at, 0, next, values);
    if (pairs == 1) blend<T, G, 1>(rows, count, weights, width, at, 0, next, values);
    at += pairs * PAIR;
    next.rows = nullptr;
  }
  if (whole < dim) blend<T, G, 1>(rows, count, weights, width, whole, dim - whole, next, values);
}

// logits -> weights e^(logit - top), with top raised and what was summed before scaled down where needed
inline void weigh_tile(float* logits, float* top, float* total, float* values, int64_t width) {
  F most = splat(-INFINITY);
  for (int t = 0; t < TILE; t += NW) {
    const F x = load(logits + t);
    most = x > most ? x : most;
  }
  const float peak = largest(most);
  if (peak > *top) {
    const float shrink = *top == -INFINITY ? 0 : expf(*top - peak);
    *total *= shrink;
    for (int64_t i = 0; i < width; i += NW) store(values + i, load(values + i) * shrink);
    *top = peak;
  }
  F mass = F{};
  const float base = *top == -INFINITY ? 0 : *top;
  for (int t = 0; t < TILE; t += NW) {
    const F weight = exp(load(logits + t) - base);
    store(logits + t, weight);
    mass += weight;
  }
  *total += sum(mass);
}

// Adds `count` <= TILE tokens for G heads of the group. The arrays have room for TILE rows.
template <class T, int G>
void add_heads(const Tile<T>& keys, const Tile<T>& values, int count, int padded, Next<T> next_keys,
               Next<T> next_values, const float* query, int dim, int value_dim, float scaling, Part part) {
  const int64_t width = lanes(value_dim);
  float weights[G * TILE];
  dots<T, G>(keys.row, padded, next_keys, query, dim, scaling, weights);
  for (int g = 0; g < G; g++) {
    if constexpr (is_packed<T>)
      for (int t = padded; t < TILE; t++) weights[g * TILE + t] = 0;
    keys.rescale(weights + g * TILE);
    for (int t = 0; keys.log_weights && t < count; t++) weights[g * TILE + t] += keys.log_weights[t];
    for (int t = count; t < TILE; t++) weights[g * TILE + t] = -INFINITY;
    weigh_tile(weights + g * TILE, part.top + g, part.total + g, part.values + g * width, width);
    values.rescale(weights + g * TILE);
  }
  blend_row<T, G>(values.row, count, weights, value_dim, next_values, part.values);
}

template <class T>
void add_tile(Tile<T>& keys, Tile<T>& values, int count, Next<T> next_keys, Next<T> next_values, const float* query,
              int group, int dim, int value_dim, float scaling, Part part) {
  const int padded = (count + 3) / 4 * 4;
  keys.pad(count, padded);
  values.pad(count, padded);
  for (int g = 0; g < group; g += SHARED) {
    const Part own = {part.top + g, part.total + g, part.values + g * lanes(value_dim)};
    const float* q = query + g * lanes(dim);
    const int heads = group - g < SHARED ? group - g : SHARED;
    if (heads == 1) add_heads<T, 1>(keys, values, count, padded, next_keys, next_values, q, dim, value_dim, scaling, own);
    if (heads == 2) add_heads<T, 2>(keys, values, count, padded, next_keys, next_values, q, dim, value_dim, scaling, own);
#if defined(__AVX512F__)
    if (heads == 3) add_heads<T, 3>(keys, values, count, padded, next_keys, next_values, q, dim, value_dim, scaling, own);
    if (heads == 4) add_heads<T, 4>(keys, values, count, padded, next_keys, next_values, q, dim, value_dim, scaling, own);
#endif
    next_keys.rows = next_values.rows = nullptr;
  }
}

inline void clear(Part part, int64_t group, int64_t value_dim) {
  for (int64_t g = 0; g < group; g++) {
    part.top[g] = -INFINITY;
    part.total[g] = 0;
  }
  memset(part.values, 0, size_t(group * lanes(value_dim)) * sizeof(float));
}

// Adds the tokens that next_token() gives, until it gives one below 0; log_weights, where there are any, in the same order.
template <class T, class Source>
void add_tokens(Held<T> keys, Held<T> values, Source next_token, const float* query, int group, int dim,
                int value_dim, float scaling, Part part, const float* log_weights = nullptr) {
  Tile<T> key[2], value[2];
  auto fill = [&](int side) {
    int n = 0;
    key[side].log_weights = log_weights;
    for (int64_t token; n < TILE && (token = next_token()) >= 0; n++) {
      key[side].add(n, keys, token);
      value[side].add(n, values, token);
    }
    key[side].row[n] = value[side].row[n] = nullptr;
    if (log_weights) log_weights += n;
    return n;
  };
  int side = 0, count = fill(side);
  for (int t = 0; t < count; t++) prefetch_row(key[side].row[t], bytes_of<T>(dim));
  for (int t = 0; t < count; t++) prefetch_row(value[side].row[t], bytes_of<T>(value_dim));
  while (count > 0) {
    const int following = count == TILE ? fill(1 - side) : 0;
    const Next<T> keys_then = {following ? key[1 - side].row : nullptr, bytes_of<T>(dim)};
    const Next<T> values_then = {following ? value[1 - side].row : nullptr, bytes_of<T>(value_dim)};
    add_tile(key[side], value[side], count, keys_then, values_then, query, group, dim, value_dim, scaling, part);
    side = 1 - side;
    count = following;
  }
}

}  // namespace
#endif
