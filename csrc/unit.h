// A unit is one row and one KV head: where its tensors lie, and its scratch.
#ifndef SAD_UNIT_H
#define SAD_UNIT_H

#include "choose.h"
#include "rotate.h"
#include "softmax.h"

namespace {

// tokens attended by one work item; fixed, so that results do not depend on the number of threads
constexpr int64_t LISTED = 256, DENSE = 512;

struct Unit {
  int64_t row, head, index;
};
inline Unit unit_at(const sad_call* c, int64_t index) {
  return {index / c->kv_heads, index % c->kv_heads, index};
}

template <class T>
const T* keys_of(const sad_call* c, Unit u) {
  return static_cast<const T*>(c->keys) + u.row * c->key_row + u.head * c->key_head;
}
template <class T>
const T* values_of(const sad_call* c, Unit u) {
  return static_cast<const T*>(c->values) + u.row * c->value_row + u.head * c->value_head;
}
template <class T>
Held<T> held_keys(const sad_call* c, Unit u) {
  return {keys_of<T>(c, u), c->key_token, c->key_scales + u.row * c->key_scale_row + u.head * c->key_scale_head};
}
// Of a packed cache the tokens from this one on are whole, kept as they came; of any other none is told apart.
inline int64_t whole_from(const sad_call* c) { return c->cache_type >= SAD_INT8 ? c->whole_from : c->length; }
inline bool has_whole(const sad_call* c) { return whole_from(c) < c->length; }
template <class Q>
Held<Q> whole_keys(const sad_call* c, Unit u) {
  return {static_cast<const Q*>(c->whole_keys) + u.row * c->whole_key_row + u.head * c->whole_key_head,
          c->whole_key_token, nullptr};
}
template <class Q>
Held<Q> whole_values(const sad_call* c, Unit u) {
  return {static_cast<const Q*>(c->whole_values) + u.row * c->whole_value_row + u.head * c->whole_value_head,
          c->whole_value_token, nullptr};
}
template <class T>
Held<T> held_values(const sad_call* c, Unit u) {
  return {values_of<T>(c, u), c->value_token, c->value_scales + u.row * c->value_scale_row + u.head * c->value_scale_head};
}

// the group's query vectors as rows of type T are kept, rotated or not, and in the order in which these are loaded;
// zeros behind D
template <class T, class Q>
void place_query_of(const sad_call* c, Unit u, float* placed) {
  const Q* query = static_cast<const Q*>(c->query) + u.row * c->query_row + u.head * c->group * c->query_head;
  const int64_t width = lanes(c->dim);
  memset(placed, 0, size_t(c->group * width) * sizeof(float));
  for (int64_t g = 0; g < c->group; g++) {
    float x[SAD_MOST_DIM];
    for (int i = 0; i < c->dim; i++) x[i] = widen(query[g * c->query_head + i]);
    if constexpr (is_packed<T>) rotate(c->rotation, x, int(c->dim));
    for (int i = 0; i < c->dim; i++) placed[g * width + i / PAIR * PAIR + place<T>(i % PAIR)] = x[i];
  }
}
template <class T>
void place_query(const sad_call* c, Unit u, float* placed) {
  if (c->query_type == SAD_BFLOAT16) return place_query_of<T, bf16>(c, u, placed);
  if (c->query_type == SAD_FLOAT16) return place_query_of<T, f16>(c, u, placed);
  place_query_of<T, float>(c, u, placed);
}
// for rows that are whole
inline void place_whole_query(const sad_call* c, Unit u, float* placed) {
  if (c->query_type == SAD_BFLOAT16) return place_query<bf16>(c, u, placed);
  if (c->query_type == SAD_FLOAT16) return place_query<f16>(c, u, placed);
  place_query<float>(c, u, placed);
}
inline const uint8_t* codes_of(const sad_call* c, Unit u) { return c->codes + u.row * c->code_row + u.head * c->code_head; }
inline const uint16_t* factors_of(const sad_call* c, Unit u) {
  return c->factors + u.row * c->factor_row + u.head * c->factor_head;
}

// the codes of a unit's middle, block by block from the first that holds a middle token
struct Stream {
  const uint8_t* codes;
  const uint16_t* factors;
  int words;

  const uint8_t* block(int64_t index) const { return codes + index * (BLOCK * 4 * words); }
  const uint16_t* factor(int64_t index) const { return factors + index * BLOCK; }
};
inline Stream middle_of(const sad_call* c, Unit u) {
  const int words = int(c->dim + 15) / 16;
  const int64_t first = c->low / BLOCK * BLOCK;
  return {codes_of(c, u) + first * 4 * words, factors_of(c, u) + first, words};
}

// What a call needs beside its tensors: one block of the calling thread's, cut into pieces. Without a block it measures.
struct Scratch {
  char* base;
  int64_t used;

  template <class X>
  X* take(int64_t count) {
    X* taken = base ? reinterpret_cast<X*>(base + used) : nullptr;
    used += (count * int64_t(sizeof(X)) + 63) / 64 * 64;
    return taken;
  }
};

// spans are scored a piece at a time: pieces of 1024 tokens, in long contexts 16 of them
inline int64_t spans_a_scan(int64_t spans) { return spans > 64 ? (spans + 15) / 16 : 4; }
inline int64_t scans_of(int64_t spans) { return (spans + spans_a_scan(spans) - 1) / spans_a_scan(spans); }

// What a long middle is sifted with, see sift.h.
struct Sieve {
  float* cut;        // [G] a token is a candidate if the logit of any head reaches its cut
  float* bulk;       // [scans][G] e^(logit - cut) of the sampled tokens that are none
  int64_t* found;    // [scans] candidates
  int32_t* candidate;  // their tokens, piece by piece
};

// scratch of one unit of score, select or step
struct Work {
  sad_weights* weights;  // [G]
  float* query;      // [G][lanes(D)]
  float* part;       // attention to the near tokens, then to all that are read
  float* extra;      // parts of the pieces beyond the first
  float *whole_query, *whole;  // the query and the part of tokens that are whole
  float *near_lse, *lse;  // [G], of the near tokens and of all
  Sieve sieve;
  Scores scores;
  float* room;        // [padded + 16]; of a sample, what is added to the logits of the chosen tokens
  int32_t* list;      // [padded + 16], chosen tokens relative to the first scored block
  int64_t chosen;
  int32_t pending;  // items of the running phase that are not done
};

// pieces into which the attention to a unit's chosen tokens is cut, beyond the first
inline int64_t most_extra(int64_t tokens) { return tokens / LISTED < 15 ? tokens / LISTED : 15; }

inline Work* take_work(Scratch* s, const sad_call* c) {
  const int64_t count = c->high > c->low ? c->high - c->low / BLOCK * BLOCK : 0;
  const int64_t padded = (count + SPAN - 1) / SPAN * SPAN, spans = padded / SPAN;
  Work* work = s->take<Work>(c->batch * c->kv_heads);
  for (int64_t i = 0; i < c->batch * c->kv_heads; i++) {
    Work w = {};
    w.weights = s->take<sad_weights>(c->group);
    w.query = s->take<float>(c->group * lanes(c->dim));
    w.part = s->take<float>(part_size(c->group, c->value_dim));
    w.extra = s->take<float>(most_extra(padded) * part_size(c->group, c->value_dim));
    w.whole_query = s->take<float>(has_whole(c) ? c->group * lanes(c->dim) : 0);
    w.whole = s->take<float>(has_whole(c) ? part_size(c->group, c->value_dim) : 0);
    w.near_lse = s->take<float>(c->group);
    w.lse = s->take<float>(c->group);
    w.sieve = {s->take<float>(c->group), s->take<float>(scans_of(spans) * c->group), s->take<int64_t>(scans_of(spans)),
               s->take<int32_t>(padded + 16)};
    w.scores = {count, padded, padded, s->take<float>(c->group * padded), s->take<float>(spans * c->group),
                s->take<float>(spans * c->group)};
    w.room = s->take<float>(padded + 16);
    w.list = s->take<int32_t>(padded + 16);
    if (s->base) work[i] = w;
  }
  return work;
}

// What a part is worth beside another: both are brought to the larger top.
struct Merged {
  float top, keep, add;

  Merged(float into, float from) {
    top = from > into ? from : into;
    const float base = top == -INFINITY ? 0 : top;
    keep = expf(into - base), add = expf(from - base);
  }
};

// Output and log-sum-exp of a unit. `whole`: the part of tokens that are whole, whose values are not rotated, or null.
template <class T>
void finish(const sad_call* c, Unit u, Part part, const Part* whole) {
  const int64_t width = lanes(c->value_dim);
  const bool alternate = c->query_type == SAD_BFLOAT16;
  for (int64_t g = 0; g < c->group; g++) {
    const int64_t head = u.index * c->group + g;
    const Merged both = {part.top[g], whole ? whole->top[g] : -INFINITY};
    const float total = part.total[g] * both.keep + (whole ? whole->total[g] * both.add : 0);
    const float share = total == 0 ? 0 : 1 / total;
    c->lse[head] = total == 0 ? -INFINITY : both.top + logf(total);
    float x[SAD_MOST_DIM];
    for (int i = 0; i < c->value_dim; i++)
      x[i] = part.values[g * width + i / PAIR * PAIR + place<T>(i % PAIR)] * (both.keep * share);
    if constexpr (is_packed<T>) unrotate(c->value_rotation, x, int(c->value_dim));
    for (int i = 0; whole && i < c->value_dim; i++)
      x[i] += whole->values[g * width + i / PAIR * PAIR + (alternate ? place<bf16>(i % PAIR) : i % PAIR)] *
              (both.add * share);
    for (int i = 0; i < c->value_dim; i++) {
      const int64_t to = head * c->value_dim + i;
      if (c->query_type == SAD_FLOAT32) narrow(x[i], static_cast<float*>(c->output) + to);
      if (c->query_type == SAD_BFLOAT16) narrow(x[i], static_cast<bf16*>(c->output) + to);
      if (c->query_type == SAD_FLOAT16) narrow(x[i], static_cast<f16*>(c->output) + to);
    }
  }
}

// adds the second part to the first
inline void merge(Part into, Part from, int64_t group, int64_t value_dim) {
  const int64_t width = lanes(value_dim);
  for (int64_t g = 0; g < group; g++) {
    const Merged both = {into.top[g], from.top[g]};
    into.top[g] = both.top;
    into.total[g] = into.total[g] * both.keep + from.total[g] * both.add;
    for (int64_t i = g * width; i < (g + 1) * width; i += NW)
      store(into.values + i, load(into.values + i) * both.keep + load(from.values + i) * both.add);
  }
}

}  // namespace
#endif
