// Attention to the near tokens, to the chosen ones, and, as an operation of its own, to any list or to all.
#ifndef SAD_ATTEND_H
#define SAD_ATTEND_H

#include "parallel.h"
#include "unit.h"

extern "C" void* sad_scratch(size_t bytes);

namespace {

// A call on less than this is quicker on one thread than waking a second.
constexpr int64_t SMALL = 128 << 10;
inline int64_t threads_for(const sad_call* c, int64_t bytes) { return bytes < SMALL ? 1 : c->threads; }
// bytes of a token's key and value in one head
inline int64_t token_bytes(const sad_call* c) {
  const int64_t bits[] = {32, 16, 16, 8, 4};
  return (c->dim + c->value_dim) * bits[c->cache_type] / 8;
}

// adds those of the tokens that are held as the cache holds its rows
template <class T, class Source>
void add_held(const sad_call* c, Unit u, Source next_token, const float* query, Part part,
              const float* log_weights = nullptr) {
  const int64_t end = whole_from(c);
  auto next = [&]() -> int64_t {
    int64_t token = next_token();
    while (token >= end) token = next_token();
    return token;
  };
  add_tokens(held_keys<T>(c, u), held_values<T>(c, u), next, query, int(c->group), int(c->dim), int(c->value_dim),
             float(c->scaling), part, log_weights);
}

template <class Q, class Source>
void add_whole_as(const sad_call* c, Unit u, Source next_token, const float* query, Part part,
                  const float* log_weights) {
  add_tokens(whole_keys<Q>(c, u), whole_values<Q>(c, u), next_token, query, int(c->group), int(c->dim),
             int(c->value_dim), float(c->scaling), part, log_weights);
}
// adds those that are whole; log_weights, where there are any, are those of the whole ones
template <class Source>
void add_whole(const sad_call* c, Unit u, Source next_token, const float* query, Part part,
               const float* log_weights = nullptr) {
  const int64_t start = whole_from(c);
  auto next = [&]() -> int64_t {
    int64_t token = next_token();
    while (token >= 0 && token < start) token = next_token();
    return token < 0 ? token : token - start;
  };
  if (c->query_type == SAD_BFLOAT16) return add_whole_as<bf16>(c, u, next, query, part, log_weights);
  if (c->query_type == SAD_FLOAT16) return add_whole_as<f16>(c, u, next, query, part, log_weights);
  add_whole_as<float>(c, u, next, query, part, log_weights);
}

template <class T>
void attend_near(const sad_call* c, Unit u, Work* w) {
  const Part part = part_at(w->part, c->group), whole = part_at(w->whole, c->group);
  clear(part, c->group, c->value_dim);
  int64_t at = 0;
  const int64_t base = u.row * c->near_count;
  auto next = [&]() -> int64_t {
    while (c->near_valid && at < c->near_count && !c->near_valid[base + at]) at++;
    return at < c->near_count ? c->near[base + at++] : -1;
  };
  add_held<T>(c, u, next, w->query, part);
  if (has_whole(c)) {
    clear(whole, c->group, c->value_dim);
    at = 0;
    add_whole(c, u, next, w->whole_query, whole);
  }
  for (int64_t g = 0; g < c->group; g++) {
    const Merged both = {part.top[g], has_whole(c) ? whole.top[g] : -INFINITY};
    const float total = part.total[g] * both.keep + (has_whole(c) ? whole.total[g] * both.add : 0);
    w->near_lse[g] = total == 0 ? -INFINITY : both.top + logf(total);
  }
}

// true for the thread that finishes the last item of a unit's phase
inline bool last(Work* w) { return __atomic_sub_fetch(&w->pending, 1, __ATOMIC_ACQ_REL) == 0; }

template <class T>
void attend_chosen(const sad_call* c, Unit u, Work* w, int64_t piece, int64_t pieces) {
  const int64_t size = part_size(c->group, c->value_dim);
  const Part part = part_at(piece ? w->extra + (piece - 1) * size : w->part, c->group);
  if (piece) clear(part, c->group, c->value_dim);
  int64_t at = w->chosen * piece / pieces;
  const int64_t end = w->chosen * (piece + 1) / pieces;
  auto next = [&]() -> int64_t { return at < end ? w->list[at++] : -1; };
  add_held<T>(c, u, next, w->query, part, c->sampled ? w->room + at : nullptr);
  if (!last(w)) return;
  // in order, whoever comes last: the result does not depend on which thread that is
  const Part all = part_at(w->part, c->group), whole = part_at(w->whole, c->group);
  for (int64_t i = 1; i < pieces; i++) merge(all, part_at(w->extra + (i - 1) * size, c->group), c->group, c->value_dim);
  // few, and the last of the list; none where the window is as long as what is whole
  if (has_whole(c) && w->chosen && w->list[w->chosen - 1] >= whole_from(c)) {
    int64_t n = 0;
    while (w->list[n] < whole_from(c)) n++;
    const float* log_weights = c->sampled ? w->room + n : nullptr;
    add_whole(c, u, [&]() -> int64_t { return n < w->chosen ? w->list[n++] : -1; }, w->whole_query, whole, log_weights);
  }
  finish<T>(c, u, all, has_whole(c) ? &whole : nullptr);
}

// all tokens, or those listed, cut into items of a fixed size; what is whole is added by who finishes a unit
template <class T>
int attend(const sad_call* c) {
  const int64_t units = c->batch * c->kv_heads, size = part_size(c->group, c->value_dim);
  const int64_t count = c->tokens ? c->tokens_room : whole_from(c), step = c->tokens ? LISTED : DENSE;
  const int64_t pieces = count > step ? (count + step - 1) / step : 1, placed = c->group * lanes(c->dim);
  const int64_t bytes = units * (2 * placed * 4 + (pieces + 1) * size * 4 + 256) + units * 64;
  Scratch scratch = {static_cast<char*>(sad_scratch(size_t(bytes))), 0};
  if (!scratch.base) return SAD_NO_MEMORY;
  float* queries = scratch.take<float>(units * placed);
  float* parts = scratch.take<float>(units * pieces * size);
  float* whole_queries = scratch.take<float>(has_whole(c) ? units * placed : 0);
  float* wholes = scratch.take<float>(has_whole(c) ? units * size : 0);
  int32_t* pending = scratch.take<int32_t>(units);
  for (int64_t i = 0; i < units; i++) {
    pending[i] = int32_t(pieces);
    place_query<T>(c, unit_at(c, i), queries + i * placed);
    if (has_whole(c)) place_whole_query(c, unit_at(c, i), whole_queries + i * placed);
  }
  const int64_t read = units * count * token_bytes(c);
  each(threads_for(c, read), units * pieces, [&](int64_t item) {
    const Unit u = unit_at(c, item / pieces);
    const int64_t piece = item % pieces;
    const Part part = part_at(parts + item * size, c->group);
    clear(part, c->group, c->value_dim);
    int64_t at = piece * step, to = (piece + 1) * step < count ? (piece + 1) * step : count;
    const uint8_t* valid = c->tokens ? (c->tokens_valid ? c->tokens_valid + u.index * count : nullptr)
                                     : (c->middle ? c->middle + u.row * c->length : nullptr);
    const int64_t* listed = c->tokens ? c->tokens + u.index * count : nullptr;
    auto next = [&]() -> int64_t {
      while (valid && at < to && !valid[at]) at++;
      return at < to ? (listed ? listed[at++] : at++) : -1;
    };
    add_held<T>(c, u, next, queries + u.index * placed, part);
    if (__atomic_sub_fetch(pending + u.index, 1, __ATOMIC_ACQ_REL) != 0) return;
    const Part all = part_at(parts + u.index * pieces * size, c->group);
    const Part whole = part_at(wholes + u.index * size, c->group);
    for (int64_t i = 1; i < pieces; i++)
      merge(all, part_at(parts + (u.index * pieces + i) * size, c->group), c->group, c->value_dim);
    if (has_whole(c)) {
      clear(whole, c->group, c->value_dim);
      at = listed ? 0 : count;
      to = listed ? count : c->length;
      add_whole(c, u, next, whole_queries + u.index * placed, whole);
    }
    finish<T>(c, u, all, has_whole(c) ? &whole : nullptr);
  });
  return SAD_OK;
}

}  // namespace
#endif
