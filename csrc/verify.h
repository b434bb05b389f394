// Attention of the newest tokens' queries to all tokens each may see: what a draft is verified with.
#ifndef SAD_VERIFY_H
#define SAD_VERIFY_H

#include "attend.h"

namespace {

// The heads of one query among those of all: they lie one query after the other, G heads each.
inline Part heads_of(Part all, int64_t query, int64_t group, int64_t value_dim) {
  const int64_t first = query * group;
  return {all.top + first, all.total + first, all.values + first * lanes(value_dim)};
}

// `count` queries a unit, so that `group` is count * G; query n sees length - count + 1 + n tokens. A query gets what
// attend() would give it alone, bit for bit: the same pieces and tiles in the same order. Rows are loaded once for all
// queries, but for the last tiles, whose tokens not all of them see.
template <class T>
int verify(const sad_call* c) {
  const int64_t units = c->batch * c->kv_heads, size = part_size(c->group, c->value_dim), own = c->group / c->count;
  const int64_t first = c->length - c->count + 1, pieces = (c->length + DENSE - 1) / DENSE;
  const int64_t queries_size = c->group * lanes(c->dim);
  const int64_t bytes = units * (queries_size * 4 + pieces * size * 4 + 128) + units * 64;
  Scratch scratch = {static_cast<char*>(sad_scratch(size_t(bytes))), 0};
  if (!scratch.base) return SAD_NO_MEMORY;
  float* queries = scratch.take<float>(units * queries_size);
  float* parts = scratch.take<float>(units * pieces * size);
  int32_t* pending = scratch.take<int32_t>(units);
  for (int64_t i = 0; i < units; i++) {
    pending[i] = int32_t(pieces);
    place_query<T>(c, unit_at(c, i), queries + i * queries_size);
  }
  each(threads_for(c, units * c->length * token_bytes(c)), units * pieces, [&](int64_t item) {
    const Unit u = unit_at(c, item / pieces);
    const int64_t from = item % pieces * DENSE, to = from + DENSE;
    const Part part = part_at(parts + item * size, c->group);
    clear(part, c->group, c->value_dim);
    auto add = [&](int64_t begin, int64_t end, const float* query, int64_t heads, Part into) {
      int64_t at = begin;
      auto next = [&]() -> int64_t { return at < end ? at++ : -1; };
      add_tokens(held_keys<T>(c, u), held_values<T>(c, u), next, query, int(heads), int(c->dim), int(c->value_dim),
                 float(c->scaling), into);
    };
    const float* query = queries + u.index * queries_size;
    const int64_t seen = first < to ? first : to, shared = seen > from ? from + (seen - from) / TILE * TILE : from;
    add(from, shared, query, c->group, part);
    for (int64_t n = 0; n < c->count; n++)
      add(shared, first + n < to ? first + n : to, query + n * own * lanes(c->dim), own,
          heads_of(part, n, own, c->value_dim));
    if (__atomic_sub_fetch(pending + u.index, 1, __ATOMIC_ACQ_REL) != 0) return;
    const Part all = part_at(parts + u.index * pieces * size, c->group);
    for (int64_t n = 0; n < c->count; n++)
      for (int64_t i = 1; i * DENSE < first + n; i++)
        merge(heads_of(all, n, own, c->value_dim),
              heads_of(part_at(parts + (u.index * pieces + i) * size, c->group), n, own, c->value_dim), own,
              c->value_dim);
    finish<T>(c, u, all, nullptr);
  });
  return SAD_OK;
}

}  // namespace
#endif
