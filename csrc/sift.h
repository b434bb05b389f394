// Long middles: exponentials are taken only of tokens that may be chosen.
//
// One block in eight is scored first. It says about what the normaliser is and what share
// the floor's last token has: that gives each head a cut. The scan keeps tokens of which a head
// reaches its cut and drops the rest in registers. The normaliser is exact for the kept; for the
// dropped, thousands of small terms, it is eight times the sample's. Afterwards the dropped are proved
// to be below all that were chosen; where the sample misled, the middle is scanned again without cuts.
#ifndef SAD_SIFT_H
#define SAD_SIFT_H

#include "unit.h"

namespace {

// middles of fewer tokens are scored whole
constexpr int64_t SIFTED = 16384;
constexpr int64_t SAMPLED = 8, OFFSET = 4, TOKENS = TOGETHER * BLOCK;

inline bool is_sifted(const sad_call* c, const Work* w) {
  // a sample adds up every share
  return !c->middle && !c->sampled && w->scores.count >= SIFTED;
}

// the first and the last block may reach beyond the middle; no sampled one does
inline int64_t samples_of(const Work* w) { return (w->scores.count / BLOCK - OFFSET - 1) / SAMPLED + 1; }
inline int64_t sample_spans(const Work* w) { return (samples_of(w) * BLOCK + SPAN - 1) / SPAN; }

// masses of one span of sampled blocks
inline void sample_span(const sad_call* c, Unit u, Work* w, int64_t span) {
  const Stream stream = middle_of(c, u);
  const Scores s = w->scores;
  for (int64_t i = span * (SPAN / BLOCK); i < (span + 1) * (SPAN / BLOCK); i++) {
    float* own = s.mass + i * BLOCK;
    if (i < samples_of(w)) {
      const int64_t block = OFFSET + i * SAMPLED;
      for (int line = 0; line < stream.words; line++) prefetch(stream.block(block + 4 * SAMPLED) + 64 * line);
      score_blocks<1>(stream.block(block), stream.factor(block), w->weights, int(c->group), stream.words, own, s.stride);
    } else {
      for (int64_t g = 0; g < c->group; g++)
        for (int64_t t = 0; t < BLOCK; t++) own[g * s.stride + t] = -INFINITY;
    }
  }
  weigh_span(s, span, c->group);
}

// the sample's masses -> cuts
inline void set_cuts(const sad_call* c, Work* w) {
  Scores s = w->scores;
  s.count = samples_of(w) * BLOCK;
  s.padded = sample_spans(w) * SPAN;
  share_out(s, c->group, w->near_lse, w->lse);
  for (int64_t i = s.count; i < s.padded; i++) s.mass[i] = -1;
  // a single token of weight stands for itself, not for eight
  float single = 0, grown = 0, share = 0;
  for (int64_t i = 0; i < s.count; i++) single += s.mass[i] > 0.01f ? s.mass[i] : 0;
  for (int64_t g = 0; g < c->group; g++) {
    const float small = 1 - expf(w->near_lse[g] - w->lse[g]) - single;
    const float factor = small > 0 ? 1 + float(SAMPLED - 1) * small : 1;
    w->sieve.cut[g] = w->lse[g] + logf(factor);
    grown += factor / float(c->group);
  }
  // of the floor's tokens about one in eight is in the sample; some more, to be on the safe side
  const int64_t rank = c->floor / SAMPLED + c->floor / (4 * SAMPLED) + 8;
  if (rank < s.count) {
    const int32_t bits = bits_of_rank(s.mass, s.padded, rank, 0);
    memcpy(&share, &bits, 4);
    share /= grown;
  }
  if (c->threshold > 0 && float(c->threshold) < share) share = float(c->threshold);
  for (int64_t g = 0; g < c->group; g++) w->sieve.cut[g] += logf(0.7f * share);
}

// Appends the candidates of one block of a scored group to the piece's; returns how many the piece has then.
inline int64_t keep(const float* logits, const float* cut, int64_t group, int64_t token, int64_t found, int32_t* candidate,
                    float* mass, int64_t stride) {
#if defined(__AVX512F__)
  __m512 over = _mm512_set1_ps(-INFINITY);
  for (int64_t g = 0; g < group; g++)
    over = _mm512_max_ps(_mm512_sub_ps(_mm512_loadu_ps(logits + g * TOKENS), _mm512_set1_ps(cut[g])), over);
  const __mmask16 hit = _mm512_cmp_ps_mask(over, _mm512_setzero_ps(), _CMP_GE_OQ);
  if (!hit) return found;
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i tokens = _mm512_add_epi32(lane, _mm512_set1_epi32(int32_t(token)));
  _mm512_storeu_si512(candidate + found, _mm512_maskz_compress_epi32(hit, tokens));
  for (int64_t g = 0; g < group; g++)
    _mm512_storeu_ps(mass + g * stride + found, _mm512_maskz_compress_ps(hit, _mm512_loadu_ps(logits + g * TOKENS)));
  return found + __builtin_popcount(hit);
#else
  for (int t = 0; t < BLOCK; t++) {
    bool hit = false;
    for (int64_t g = 0; g < group; g++) hit |= logits[g * TOKENS + t] - cut[g] >= 0;
    candidate[found] = int32_t(token) + t;
    for (int64_t g = 0; g < group; g++) mass[g * stride + found] = logits[g * TOKENS + t];
    found += hit;
  }
  return found;
#endif
}

// e^(logit - cut) of the tokens of a block that are no candidates
inline void add_bulk(const float* logits, const float* cut, int64_t group, float* bulk) {
  F over[BLOCK / NW];
  for (int i = 0; i < BLOCK / NW; i++) {
    over[i] = splat(-INFINITY);
    for (int64_t g = 0; g < group; g++) {
      const F x = load(logits + g * TOKENS + i * NW) - cut[g];
      over[i] = x > over[i] ? x : over[i];
    }
  }
  for (int64_t g = 0; g < group; g++)
    for (int i = 0; i < BLOCK / NW; i++) {
      const F x = load(logits + g * TOKENS + i * NW) - cut[g];
      bulk[g] += sum(exp(over[i] >= 0 ? splat(-INFINITY) : x));
    }
}

inline void sift_piece(const sad_call* c, Unit u, Work* w, int64_t piece) {
  const Stream stream = middle_of(c, u);
  const Scores s = w->scores;
  const int64_t from = piece * spans_a_scan(s.padded / SPAN) * SPAN, end = from + spans_a_scan(s.padded / SPAN) * SPAN;
  const int64_t to = end < s.count ? end : s.count;
  float *bulk = w->sieve.bulk + piece * c->group, logits[SAD_MOST_GROUP * TOKENS];
  for (int64_t g = 0; g < c->group; g++) bulk[g] = 0;
  int64_t found = 0;
  for (int64_t at = from; at < to; at += TOKENS) {
    const int64_t block = at / BLOCK, blocks = (to - at + BLOCK - 1) / BLOCK;
    for (int line = 0; line < TOGETHER * stream.words; line++) prefetch(stream.block(block) + 4096 + 64 * line);
    score_some(stream.block(block), stream.factor(block), w->weights, int(c->group), stream.words, blocks, logits,
               TOKENS);
    for (int64_t g = 0; g < c->group; g++) {
      for (int64_t t = 0; at == 0 && t < c->low % BLOCK; t++) logits[g * TOKENS + t] = -INFINITY;
      for (int64_t t = to - at; t < TOKENS; t++) logits[g * TOKENS + t] = -INFINITY;
    }
    for (int64_t t = 0; t < TOKENS; t += BLOCK) {
      found = keep(logits + t, w->sieve.cut, c->group, at + t, found, w->sieve.candidate + from, s.mass + from, s.stride);
      if ((at + t) / BLOCK % SAMPLED == OFFSET && at + t + BLOCK <= s.count) add_bulk(logits + t, w->sieve.cut, c->group, bulk);
    }
  }
  w->sieve.found[piece] = found;
}

// the pieces' candidates, moved together
inline int64_t gather_pieces(const sad_call* c, Work* w) {
  const Scores s = w->scores;
  const int64_t spans = s.padded / SPAN, size = spans_a_scan(spans) * SPAN;
  int64_t total = w->sieve.found[0];
  for (int64_t piece = 1; piece < scans_of(spans); piece++) {
    const int64_t found = w->sieve.found[piece];
    memmove(w->sieve.candidate + total, w->sieve.candidate + piece * size, found * sizeof(int32_t));
    for (int64_t g = 0; g < c->group; g++)
      memmove(s.mass + g * s.stride + total, s.mass + g * s.stride + piece * size, found * sizeof(float));
    total += found;
  }
  return total;
}

// Candidates -> list; false where a token that was dropped might belong to the best.
inline bool choose_sifted(const sad_call* c, Unit u, Work* w) {
  Scores s = w->scores;
  const int64_t middle = s.count - c->low % BLOCK, floor = c->floor < middle ? c->floor : middle;
  const int64_t scans = scans_of(s.padded / SPAN);
  s.count = gather_pieces(c, w);
  s.padded = (s.count + SPAN - 1) / SPAN * SPAN;
  float beside[SAD_MOST_GROUP], bulk[SAD_MOST_GROUP];
  for (int64_t g = 0; g < c->group; g++) {
    for (int64_t i = s.count; i < s.padded; i++) s.mass[g * s.stride + i] = -INFINITY;
    float sum = 0;
    for (int64_t piece = 0; piece < scans; piece++) sum += w->sieve.bulk[piece * c->group + g];
    bulk[g] = sum > 0 ? w->sieve.cut[g] + logf(float(SAMPLED) * sum) : -INFINITY;
    const float near = w->near_lse[g], top = near > bulk[g] ? near : bulk[g];
    beside[g] = top == -INFINITY ? top : top + logf(expf(near - top) + expf(bulk[g] - top));
  }
  for (int64_t span = 0; span < s.padded / SPAN; span++) weigh_span(s, span, c->group);
  float all = share_out(s, c->group, beside, w->lse), bound = 0;
  for (int64_t i = s.count; i < s.padded; i++) s.mass[i] = -1;
  for (int64_t g = 0; g < c->group; g++) {
    bulk[g] = expf(bulk[g] - w->lse[g]) / float(c->group);
    all += bulk[g];
    // what a dropped token's share stays below
    bound += expf(w->sieve.cut[g] - w->lse[g]) / float(c->group);
  }
  w->chosen = choose(s.mass, s.padded, s.count, floor, c->cap, float(c->threshold), w->room, w->list);
  float read = 0, least = 2;
  for (int64_t i = 0; i < w->chosen; i++) {
    const float share = s.mass[w->list[i]];
    read += share;
    least = share < least ? share : least;
  }
  c->missing[u.index] = all > read ? all - read : (all == all ? 0 : all);
  if (c->head_missing)
    leave(s, c->group, w->list, w->chosen, c->missing[u.index], bulk, c->head_missing + u.index * c->group);
  for (int64_t i = 0; i < w->chosen; i++) w->list[i] = w->sieve.candidate[w->list[i]];
  const bool by_threshold = c->threshold > 0 && least > float(c->threshold) && bound <= float(c->threshold);
  return (w->chosen >= floor && (by_threshold || least >= bound)) || w->sieve.cut[0] == -INFINITY;
}

inline void finish_sifting(const sad_call* c, Unit u, Work* w) {
  if (choose_sifted(c, u, w)) return;
  // rare: the sample misled, so every token is a candidate
  for (int64_t g = 0; g < c->group; g++) w->sieve.cut[g] = -INFINITY;
  for (int64_t piece = 0; piece < scans_of(w->scores.padded / SPAN); piece++) sift_piece(c, u, w, piece);
  choose_sifted(c, u, w);
}

}  // namespace
#endif
