// score, select, attend, the step that does all three, verify, and products.
#include "kernels.h"
#include "parallel.h"
#include "attend.h"
#include "product.h"
#include "sift.h"
#include "verify.h"

namespace {

// every unit's scratch, measured first; null where there is no memory
inline Work* scratch_for(const sad_call* c) {
  Scratch scratch = {nullptr, 0};
  take_work(&scratch, c);
  scratch = {static_cast<char*>(sad_scratch(size_t(scratch.used))), 0};
  return scratch.base ? take_work(&scratch, c) : nullptr;
}

// logits of one span of a unit, -inf for what is no middle token
inline void score_span(const sad_call* c, Unit u, const sad_weights* weights, Scores s, int64_t span) {
  const Stream stream = middle_of(c, u);
  const int64_t first = c->low / BLOCK * BLOCK, from = span * SPAN, to = from + SPAN < s.count ? from + SPAN : s.count;
  for (int64_t at = from; at < to; at += TOGETHER * BLOCK) {
    const int64_t block = at / BLOCK;
    for (int line = 0; line < TOGETHER * stream.words; line++) prefetch(stream.block(block) + 4096 + 64 * line);
    score_some(stream.block(block), stream.factor(block), weights, int(c->group), stream.words,
               (to - at + BLOCK - 1) / BLOCK, s.mass + at, s.stride);
  }
  for (int64_t g = 0; g < c->group; g++) {
    float* mass = s.mass + g * s.stride;
    for (int64_t i = to; i < from + SPAN; i++) mass[i] = -INFINITY;
    for (int64_t i = from; i < c->low - first; i++) mass[i] = -INFINITY;
    if (c->middle)
      for (int64_t i = from > c->low - first ? from : c->low - first; i < to; i++)
        if (!c->middle[u.row * (c->high - c->low) + first + i - c->low]) mass[i] = -INFINITY;
  }
}

// masses of every span and the attention to near tokens -> the unit's list
inline void choose_unit(const sad_call* c, Unit u, Work* w) {
  // without a middle there is nothing before it either
  const int64_t lead = w->scores.count ? c->low % BLOCK : 0;
  const float all = share_out(w->scores, c->group, w->near_lse, w->lse);
  float* share = w->scores.mass;
  int64_t eligible = w->scores.count - lead;
  for (int64_t i = 0; i < lead; i++) share[i] = -1;
  if (c->middle)
    for (int64_t i = lead; i < w->scores.count; i++)
      if (!c->middle[u.row * (c->high - c->low) + i - lead]) {
        share[i] = -1;
        eligible--;
      }
  for (int64_t i = w->scores.count; i < w->scores.padded; i++) share[i] = -1;
  w->chosen = choose(share, w->scores.padded, eligible, c->floor, c->cap, float(c->threshold), w->room, w->list);
  if (c->sampled) {
    // a sieve is not needed then, and has room for a list
    w->chosen = sample_tail(share, w->scores.padded, float(c->threshold), w->list, w->chosen, w->sieve.candidate, w->room);
    int32_t* list = w->list;
    w->list = w->sieve.candidate;
    w->sieve.candidate = list;
  }
  float read = 0;
  for (int64_t i = 0; i < w->chosen; i++) read += share[w->list[i]];
  c->missing[u.index] = all > read ? all - read : (all == all ? 0 : all);
  if (c->head_missing)
    leave(w->scores, c->group, w->list, w->chosen, c->missing[u.index], nullptr, c->head_missing + u.index * c->group);
}

// the chosen tokens, by position, for this call and for who asked
inline void hand_out(const sad_call* c, Unit u, Work* w) {
  c->counts[u.index] = w->chosen;
  for (int64_t i = 0; i < w->chosen; i++) {
    w->list[i] += int32_t(c->low / BLOCK * BLOCK);
    if (c->tokens && i < c->tokens_room) c->tokens[u.index * c->tokens_room + i] = w->list[i];
    if (c->log_weights && i < c->tokens_room) c->log_weights[u.index * c->tokens_room + i] = w->room[i];
  }
}

// writes the new token of a unit behind those held and, where it is asked for, its code
template <class T>
void append(const sad_call* c, Unit u) {
  const int64_t last = c->length - 1;
  T* key = const_cast<T*>(keys_of<T>(c, u)) + last * c->key_token;
  T* value = const_cast<T*>(values_of<T>(c, u)) + last * c->value_token;
  sad_call own = *c;
  own.batch = own.kv_heads = own.count = own.threads = 1;
  own.keys = key;
  own.start = 0;
  // of a packed cache; they outlive the block below, for the code is made of them
  [[maybe_unused]] T row[is_packed<T> ? SAD_MOST_DIM : 1];
  [[maybe_unused]] uint16_t scale;
  if constexpr (is_packed<T>) {
    const int64_t element = c->query_type == SAD_FLOAT32 ? 4 : 2;
    own.new_key = static_cast<const char*>(c->new_key) + u.index * c->dim * element;
    const char* new_value = static_cast<const char*>(c->new_value) + u.index * c->value_dim * element;
    const bool stays_whole = has_whole(c);
    // a key is coded as it will be stored, whenever that is
    own.keys = stays_whole ? row : key;
    own.key_scales = stays_whole ? &scale : const_cast<uint16_t*>(held_keys<T>(c, u).scales) + last;
    if (!stays_whole || c->count) SAD_NAMED(pack)(&own);
    if (stays_whole) {
      const int64_t token = last - c->whole_from;
      const int64_t key_at = u.row * c->whole_key_row + u.head * c->whole_key_head + token * c->whole_key_token;
      const int64_t value_at = u.row * c->whole_value_row + u.head * c->whole_value_head + token * c->whole_value_token;
      char* to_key = static_cast<char*>(c->whole_keys) + element * key_at;
      char* to_value = static_cast<char*>(c->whole_values) + element * value_at;
      memcpy(to_key, own.new_key, size_t(c->dim * element));
      memcpy(to_value, new_value, size_t(c->value_dim * element));
    } else {
      sad_call other = own;
      other.new_key = new_value;
      other.keys = value;
      other.key_scales = const_cast<uint16_t*>(held_values<T>(c, u).scales) + last;
      other.dim = c->value_dim;
      other.rotation = c->value_rotation;
      SAD_NAMED(pack)(&other);
    }
  } else {
    memcpy(key, static_cast<const T*>(c->new_key) + u.index * c->dim, c->dim * sizeof(T));
    memcpy(value, static_cast<const T*>(c->new_value) + u.index * c->value_dim, c->value_dim * sizeof(T));
  }
  if (!c->count) return;
  own.start = last;
  own.codes = const_cast<uint8_t*>(codes_of(c, u));
  own.factors = const_cast<uint16_t*>(factors_of(c, u));
  own.mean = c->mean + u.index * c->dim;
  own.deviation = c->deviation + u.index * c->dim;
  SAD_NAMED(encode)(&own);
}

template <class T>
int append_and_attend(const sad_call* c) {
  for (int64_t i = 0; c->new_key && i < c->batch * c->kv_heads; i++) append<T>(c, unit_at(c, i));
  return attend<T>(c);
}

template <class T>
int step(const sad_call* c) {
  Work* work = scratch_for(c);
  if (!work) return SAD_NO_MEMORY;

  const int64_t units = c->batch * c->kv_heads, spans = work[0].scores.padded / SPAN;
  const int64_t row_bytes = token_bytes(c);
  const int64_t scan_bytes = units * (c->near_count * row_bytes + spans * SPAN * c->dim / 4);
  const int64_t threads = threads_for(c, scan_bytes), together = spans_a_scan(spans), scans = scans_of(spans);
  const bool sifted = is_sifted(c, work);
  // before: attend to what is near and, where a sieve is needed, sample the middle
  const int64_t samples = sifted ? (sample_spans(work) + 7) / 8 : 0, firsts = 1 + (sifted ? samples : scans);
  for (int64_t i = 0; i < units; i++) {
    work[i].pending = int32_t(firsts);
    // before any thread reads the block that the new token's code is in
    if (c->new_key) append<T>(c, unit_at(c, i));
    SAD_NAMED(weigh)(c, i, work[i].weights);
  }
  each(threads, units * firsts, [&](int64_t item) {
    const Unit u = unit_at(c, item / firsts);
    Work* w = work + u.index;
    const int64_t piece = item % firsts - 1;
    if (piece < 0) {
      place_query<T>(c, u, w->query);
      if (has_whole(c)) place_whole_query(c, u, w->whole_query);
      attend_near<T>(c, u, w);
    } else if (sifted) {
      for (int64_t i = piece * 8; i < (piece + 1) * 8 && i < sample_spans(w); i++) sample_span(c, u, w, i);
    } else {
      for (int64_t i = piece * together; i < (piece + 1) * together && i < spans; i++) {
        score_span(c, u, w->weights, w->scores, i);
        weigh_span(w->scores, i, c->group);
      }
    }
    if (!last(w)) return;
    // who finishes a unit goes on with it
    if (sifted) {
      set_cuts(c, w);
      w->pending = int32_t(scans);
    } else {
      choose_unit(c, u, w);
      hand_out(c, u, w);
    }
  });
  each(threads, sifted ? units * scans : 0, [&](int64_t item) {
    const Unit u = unit_at(c, item / scans);
    Work* w = work + u.index;
    sift_piece(c, u, w, item % scans);
    if (!last(w)) return;
    finish_sifting(c, u, w);
    hand_out(c, u, w);
  });
  // then: attend to what was chosen
  int64_t most = 0, chosen = 0;
  for (int64_t i = 0; i < units; i++) {
    most = work[i].chosen > most ? work[i].chosen : most;
    chosen += work[i].chosen;
  }
  if (c->tokens)
    for (int64_t i = 0; i < units; i++)
      for (int64_t n = work[i].chosen; n < most; n++) {
        c->tokens[i * c->tokens_room + n] = c->low;
        if (c->log_weights) c->log_weights[i * c->tokens_room + n] = 0;
      }
  const int64_t extra = most_extra(most), pieces = 1 + extra;
  for (int64_t i = 0; i < units; i++) work[i].pending = int32_t(pieces);
  each(threads_for(c, chosen * row_bytes), units * pieces, [&](int64_t item) {
    const Unit u = unit_at(c, item / pieces);
    attend_chosen<T>(c, u, work + u.index, item % pieces, pieces);
  });
  return int(most);
}

int score(const sad_call* c) {
  const int64_t units = c->batch * c->kv_heads, count = c->high - c->low, lead = c->low % BLOCK;
  sad_weights* weights = static_cast<sad_weights*>(sad_scratch(size_t(units * c->group) * sizeof(sad_weights)));
  if (!weights) return SAD_NO_MEMORY;
  for (int64_t i = 0; i < units; i++) SAD_NAMED(weigh)(c, i, weights + i * c->group);
  const int64_t piece = 4096, pieces = (lead + count + piece - 1) / piece, tokens = TOGETHER * BLOCK;
  each(threads_for(c, units * count * c->dim / 4), units * pieces, [&](int64_t item) {
    const Unit u = unit_at(c, item / pieces);
    const Stream stream = middle_of(c, u);
    const int64_t from = item % pieces * piece, end = lead + count, to = from + piece < end ? from + piece : end;
    float* logits = c->logits + u.index * c->group * count - lead;
    for (int64_t at = from; at < to; at += tokens) {
      const bool whole = at >= lead && at + tokens <= to;
      float some[SAD_MOST_GROUP * TOGETHER * BLOCK];
      for (int line = 0; line < TOGETHER * stream.words; line++) prefetch(stream.block(at / BLOCK) + 4096 + 64 * line);
      score_some(stream.block(at / BLOCK), stream.factor(at / BLOCK), weights + u.index * c->group, int(c->group),
                 stream.words, (to - at + BLOCK - 1) / BLOCK, whole ? logits + at : some, whole ? count : tokens);
      // the first and the last tokens of a block may not be asked for
      for (int64_t g = 0; !whole && g < c->group; g++)
        for (int64_t t = at < lead ? lead : at; t < at + tokens && t < to; t++)
          logits[g * count + t] = some[g * tokens + t - at];
    }
  });
  return SAD_OK;
}

int select(const sad_call* c) {
  Work* work = scratch_for(c);
  if (!work) return SAD_NO_MEMORY;
  const int64_t units = c->batch * c->kv_heads, count = c->high - c->low, lead = c->low % BLOCK;
  each(threads_for(c, units * c->group * count * 4), units, [&](int64_t i) {
    const Unit u = unit_at(c, i);
    Work* w = work + i;
    const Scores s = w->scores;
    for (int64_t g = 0; g < c->group; g++) {
      float* mass = s.mass + g * s.stride;
      for (int64_t t = 0; t < s.padded; t++) {
        const bool counts = t >= lead && t < s.count && (!c->middle || c->middle[u.row * count + t - lead]);
        mass[t] = counts ? c->logits[(i * c->group + g) * count + t - lead] : -INFINITY;
      }
      w->near_lse[g] = c->near_lse[i * c->group + g];
    }
    for (int64_t g = 0; g < c->group; g++) w->lse[g] = top_logit(s, g, 0, s.padded);
    for (int64_t span = 0; span < s.padded / SPAN; span++) weigh_span(s, span, c->group, w->lse);
    choose_unit(c, u, w);
    hand_out(c, u, w);
    for (int64_t n = w->chosen; n < c->tokens_room; n++) c->tokens[i * c->tokens_room + n] = c->low;
  });
  return SAD_OK;
}

int read_all(const sad_call* c) {
  const int64_t piece = 1 << 16, pieces = (c->count + piece - 1) / piece;
  uint64_t all = 0;
  each(c->threads, pieces, [&](int64_t item) {
    I four[4] = {};
    const int64_t to = (item + 1) * piece < c->count ? (item + 1) * piece : c->count;
    for (int64_t at = item * piece; at + int64_t(sizeof four) <= to; at += sizeof four) {
      I next[4];
      memcpy(next, c->codes + at, sizeof next);
      for (int i = 0; i < 4; i++) four[i] ^= next[i];
    }
    const I mixed = four[0] ^ four[1] ^ four[2] ^ four[3];
    for (int i = 0; i < NW; i++) __atomic_xor_fetch(&all, uint64_t(uint32_t(mixed[i])), __ATOMIC_RELAXED);
  });
  c->counts[0] = int64_t(all);
  return SAD_OK;
}

#define SAD_BY_FLOAT(op)                                 \
  if (c->cache_type == SAD_BFLOAT16) return op<bf16>(c); \
  if (c->cache_type == SAD_FLOAT16) return op<f16>(c);   \
  return op<float>(c);
#define SAD_BY_TYPE(op)                            \
  if (c->cache_type == SAD_INT4) return op<i4>(c); \
  if (c->cache_type == SAD_INT8) return op<i8>(c); \
  SAD_BY_FLOAT(op)

}  // namespace

int SAD_NAMED(score)(const sad_call* c) { return score(c); }
int SAD_NAMED(select)(const sad_call* c) { return select(c); }
int SAD_NAMED(attend)(const sad_call* c) { SAD_BY_TYPE(append_and_attend) }
int SAD_NAMED(step)(const sad_call* c) { SAD_BY_TYPE(step) }
int SAD_NAMED(verify)(const sad_call* c) { SAD_BY_FLOAT(verify) }
int SAD_NAMED(read)(const sad_call* c) { return read_all(c); }
int SAD_NAMED(multiply)(const sad_product* c) {
  if (c->type == SAD_BFLOAT16) return product<bf16>(c);
  if (c->type == SAD_FLOAT16) return product<f16>(c);
  return product<float>(c);
}
