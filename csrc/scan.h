// Scores from codes: integer dot products of 2-bit codes with 8-bit query weights, 16 tokens at a time.
//
// A block is W rows of 16 tokens x 4 bytes, so a 32-bit lane is one token and sums need no shuffling.
// Integers make every instruction set agree to the last bit. Byte-shuffle tables were 1.4 times as
// fast on one core and need the weights in five bits (docs/experiments.md).
#ifndef SAD_SCAN_H
#define SAD_SCAN_H

#include "kernels.h"
#include "simd.h"

namespace {

constexpr int BLOCK = 16;

#if !defined(__AVX512VNNI__)
inline void dot_block(const uint8_t* block, const sad_weights& w, int words, int32_t* dot) {
#if defined(__AVX2__)
  const __m256i mask = _mm256_set1_epi8(3), ones = _mm256_set1_epi16(1);
  for (int half = 0; half < 2; half++) {
    __m256i sum = _mm256_setzero_si256();
    for (int word = 0; word < words; word++) {
      const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(block + 64 * word + 32 * half));
      // pairs of products in 16 bits: at most 4 * 2 * 3 * 127, far from saturation
      __m256i pairs = _mm256_setzero_si256();
      UNROLL for (int plane = 0; plane < 4; plane++) {
        int32_t four;
        memcpy(&four, w.of + (word * 4 + plane) * 4, 4);
        const __m256i level = _mm256_and_si256(_mm256_srli_epi32(x, 2 * plane), mask);
        pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(level, _mm256_set1_epi32(four)));
      }
      sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, ones));
    }
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(dot + 8 * half), sum);
  }
#else
  for (int t = 0; t < BLOCK; t++) dot[t] = 0;
  for (int word = 0; word < words; word++)
    for (int plane = 0; plane < 4; plane++) {
      const int8_t* four = w.of + (word * 4 + plane) * 4;
      for (int t = 0; t < BLOCK; t++)
        for (int i = 0; i < 4; i++) dot[t] += ((block[64 * word + 4 * t + i] >> (2 * plane)) & 3) * four[i];
    }
#endif
}
#endif

// dot[g][b][t]: code of token t of block b times the weights of head g, for B blocks in a row.
// Four blocks together load each weight once for 64 tokens, and no sum waits for itself.
template <int G, int B>
inline void dot_blocks(const uint8_t* block, const sad_weights* w, int words, int32_t* dot) {
#if defined(__AVX512VNNI__)
  const __m512i mask = _mm512_set1_epi8(3);
  __m512i sum[G][B];
  UNROLL for (int g = 0; g < G; g++)
    UNROLL for (int b = 0; b < B; b++) sum[g][b] = _mm512_setzero_si512();
  for (int word = 0; word < words; word++) {
    __m512i x[B], level[B];
    UNROLL for (int b = 0; b < B; b++) x[b] = _mm512_loadu_si512(block + 64 * (b * words + word));
    UNROLL for (int plane = 0; plane < 4; plane++) {
      UNROLL for (int b = 0; b < B; b++) level[b] = _mm512_and_si512(_mm512_srli_epi32(x[b], 2 * plane), mask);
      UNROLL for (int g = 0; g < G; g++) {
        int32_t four;
        memcpy(&four, w[g].of + (word * 4 + plane) * 4, 4);
        const __m512i weight = _mm512_set1_epi32(four);
        UNROLL for (int b = 0; b < B; b++) sum[g][b] = _mm512_dpbusd_epi32(sum[g][b], level[b], weight);
      }
    }
  }
  UNROLL for (int g = 0; g < G; g++)
    UNROLL for (int b = 0; b < B; b++) _mm512_storeu_si512(dot + (g * B + b) * BLOCK, sum[g][b]);
#else
  for (int b = 0; b < B; b++)
    for (int g = 0; g < G; g++) dot_block(block + 64 * b * words, w[g], words, dot + (g * B + b) * BLOCK);
#endif
}

// the factors of one block as float32
inline void widen_factors(const uint16_t* factors, float* wide) {
#if defined(__AVX512F__)
  store(wide, (F)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(factors))));
#else
  for (int at = 0; at < BLOCK; at += PAIR) {
    const Pair pair = load_pair(reinterpret_cast<const f16*>(factors + at));
    store(wide + at, pair.a);
    store(wide + at + NW, pair.b);
  }
#endif
}

template <int G, int B>
inline void score_heads(const uint8_t* block, const float* factors, const sad_weights* w, int words, float* logits,
                        int64_t stride) {
  alignas(64) int32_t dot[G * B * BLOCK];
  dot_blocks<G, B>(block, w, words, dot);
  UNROLL for (int g = 0; g < G; g++) {
    const F slope = splat(w[g].slope), mean = splat(w[g].mean_logit);
    UNROLL for (int at = 0; at < B * BLOCK; at += NW) {
      I whole;
      memcpy(&whole, dot + g * B * BLOCK + at, sizeof whole);
      const F along = __builtin_convertvector(whole * 2 - w[g].offset, F) * load(factors + at);
      store(logits + g * stride + at, along * slope + mean);
    }
  }
}

// logits[g * stride + t] of B blocks in a row; up to four heads share one unpacking
template <int B>
inline void score_blocks(const uint8_t* block, const uint16_t* factors, const sad_weights* w, int group, int words,
                         float* logits, int64_t stride) {
  alignas(64) float wide[B * BLOCK];
  for (int b = 0; b < B; b++) widen_factors(factors + b * BLOCK, wide + b * BLOCK);
  for (int g = 0; g < group; g += 4) {
    float* own = logits + g * stride;
    const int heads = group - g < 4 ? group - g : 4;
    if (heads == 1) score_heads<1, B>(block, wide, w + g, words, own, stride);
    if (heads == 2) score_heads<2, B>(block, wide, w + g, words, own, stride);
    if (heads == 3) score_heads<3, B>(block, wide, w + g, words, own, stride);
    if (heads == 4) score_heads<4, B>(block, wide, w + g, words, own, stride);
  }
}

// blocks scored together
constexpr int TOGETHER = 4;

inline void score_some(const uint8_t* block, const uint16_t* factors, const sad_weights* w, int group, int words,
                       int64_t blocks, float* logits, int64_t stride) {
  if (blocks >= TOGETHER) return score_blocks<TOGETHER>(block, factors, w, group, words, logits, stride);
  for (int64_t b = 0; b < blocks; b++)
    score_blocks<1>(block + b * 64 * words, factors + b * BLOCK, w, group, words, logits + b * BLOCK, stride);
}

}  // namespace
#endif
