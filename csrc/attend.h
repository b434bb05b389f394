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

template <class T>
void attend_near(const sad_call* c, Unit u, Work* w) {
  const Part part = part_at(w->part, c->group);
  clear(part, c->group, c->value_dim);
  int64_t at = 0;
  const int64_t base = u.row * c->near_count;
  auto next = [&]() -> int64_t {
    while (c->near_valid && at < c->near_count && !c->near_valid[base + at]) at++;
    return at < c->near_count ? c->near[base + at++] : -1;
  };
  add_tokens(held_keys<T>(c, u), held_values<T>(c, u), next, w->query, int(c->group), int(c->dim), int(c->value_dim),
             float(c->scaling), part);
  for (int64_t g = 0; g < c->group; g++)
    w->near_lse[g] = part.total[g] == 0 ? -INFINITY : part.top[g] + logf(part.total[g]);
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
  add_tokens(held_keys<T>(c, u), held_values<T>(c, u), next, w->query, int(c->group), int(c->dim), int(c->value_dim),
             float(c->scaling), part, c->sampled ? w->room + at : nullptr);
  if (!last(w)) return;
  // in order, whoever comes last: the result does not depend on which thread that is
  const Part all = part_at(w->part, c->group);
  for (int64_t i = 1; i < pieces; i++) merge(all, part_at(w->extra + (i - 1) * size, c->group), c->group, c->value_dim);
  finish<T>(c, u, all);
}

// all tokens, or those listed, cut into items of a fixed size
template <class T>
int attend(const sad_call* c) {
  const int64_t units = c->batch * c->kv_heads, size = part_size(c->group, c->value_dim);
  const int64_t count = c->tokens ? c->tokens_room : c->length, step = c->tokens ? LISTED : DENSE;
  const int64_t pieces = count > step ? (count + step - 1) / step : 1;
  const int64_t bytes = units * (c->group * lanes(c->dim) * 4 + pieces * size * 4 + 128) + units * 64;
  Scratch scratch = {static_cast<char*>(sad_scratch(size_t(bytes))), 0};
  if (!scratch.base) return SAD_NO_MEMORY;
  float* queries = scratch.take<float>(units * c->group * lanes(c->dim));
  float* parts = scratch.take<float>(units * pieces * size);
  int32_t* pending = scratch.take<int32_t>(units);
  for (int64_t i = 0; i < units; i++) {
    pending[i] = int32_t(pieces);
    place_query<T>(c, unit_at(c, i), queries + i * c->group * lanes(c->dim));
  }
  const int64_t read = units * count * token_bytes(c);
  each(threads_for(c, read), units * pieces, [&](int64_t item) {
    const Unit u = unit_at(c, item / pieces);
    const int64_t piece = item % pieces, to = (piece + 1) * step < count ? (piece + 1) * step : count;
    const Part part = part_at(parts + item * size, c->group);
    clear(part, c->group, c->value_dim);
    int64_t at = piece * step;
    const uint8_t* valid = c->tokens ? (c->tokens_valid ? c->tokens_valid + u.index * count : nullptr)
                                     : (c->middle ? c->middle + u.row * count : nullptr);
    const int64_t* listed = c->tokens ? c->tokens + u.index * count : nullptr;
    auto next = [&]() -> int64_t {
      while (valid && at < to && !valid[at]) at++;
      return at < to ? (listed ? listed[at++] : at++) : -1;
    };
    add_tokens(held_keys<T>(c, u), held_values<T>(c, u), next, queries + u.index * c->group * lanes(c->dim), int(c->group), int(c->dim), int(c->value_dim),
               float(c->scaling), part);
    if (__atomic_sub_fetch(pending + u.index, 1, __ATOMIC_ACQ_REL) != 0) return;
    const Part all = part_at(parts + u.index * pieces * size, c->group);
    for (int64_t i = 1; i < pieces; i++)
      merge(all, part_at(parts + (u.index * pieces + i) * size, c->group), c->group, c->value_dim);
    finish<T>(c, u, all);
  });
  return SAD_OK;
}

}  // namespace
#endif
