// Which tokens to read: shares of attention from logits, then a threshold with a floor and a cap.
#ifndef SAD_CHOOSE_H
#define SAD_CHOOSE_H

#include "scan.h"

namespace {

// tokens that share one maximum: their exponentials are taken while the logits are in the first cache
constexpr int64_t SPAN = 256;

// Scored tokens of one row and KV head: M of them, padded to a multiple of SPAN.
struct Scores {
  int64_t count, padded, stride;
  // [G][stride]: logits, then e^(logit - top of its span); row 0 becomes the shares
  float* mass;
  // [padded / SPAN][G]
  float *top, *total;
};

// the largest logit of one head, of `count` tokens from `from` on
inline float top_logit(Scores s, int64_t g, int64_t from, int64_t count) {
  F most = splat(-INFINITY);
  for (int64_t i = from; i < from + count; i += NW) {
    const F x = load(s.mass + g * s.stride + i);
    most = x > most ? x : most;
  }
  const float top = largest(most);
  return top == -INFINITY ? 0 : top;
}

// Logits -> e^(logit - top) for one span of every head, with tops given or the span's own. With the
// span's own, equal logits of different spans may come out as shares that differ in the last place.
inline void weigh_span(Scores s, int64_t span, int64_t group, const float* tops = nullptr) {
  for (int64_t g = 0; g < group; g++) {
    float* mass = s.mass + g * s.stride + span * SPAN;
    const float base = tops ? tops[g] : top_logit(s, g, span * SPAN, SPAN);
    F total = F{};
    for (int64_t i = 0; i < SPAN; i += NW) {
      const F weight = exp(load(mass + i) - base);
      store(mass + i, weight);
      total += weight;
    }
    s.top[span * group + g] = base;
    s.total[span * group + g] = sum(total);
  }
}

// Masses -> shares of attention, mean over the group, in row 0, and each head's log-sum-exp. Returns their sum.
inline float share_out(Scores s, int64_t group, const float* near_lse, float* all_lse) {
  const int64_t spans = s.padded / SPAN;
  for (int64_t g = 0; g < group; g++) {
    float peak = near_lse[g];
    for (int64_t i = 0; i < spans; i++)
      if (s.total[i * group + g] > 0 && s.top[i * group + g] > peak) peak = s.top[i * group + g];
    float total = expf(near_lse[g] - peak);
    for (int64_t i = 0; i < spans; i++) total += s.total[i * group + g] * expf(s.top[i * group + g] - peak);
    const float lse = all_lse[g] = peak + logf(total);
    // from here on `top` holds the factor that makes a mass a share
    for (int64_t i = 0; i < spans; i++) s.top[i * group + g] = expf(s.top[i * group + g] - lse) / float(group);
  }
  float all = 0;
  for (int64_t i = 0; i < spans * group; i++) all += s.total[i] * s.top[i];
  for (int64_t span = 0; span < spans; span++)
    for (int64_t i = span * SPAN; i < (span + 1) * SPAN; i += NW) {
      F share = F{};
      for (int64_t g = 0; g < group; g++) share += load(s.mass + g * s.stride + i) * s.top[span * group + g];
      store(s.mass + i, share);
    }
  return all;
}

// What each head leaves unread, of the masses and factors that `share_out` left and what the group leaves, `missing`.
// outside: [G], shares over the group of what was not scored one by one, or null.
inline void leave(Scores s, int64_t group, const int32_t* list, int64_t chosen, float missing, const float* outside,
                  float* unread) {
  float others = 0;
  for (int64_t g = 1; g < group; g++) {
    float left = outside ? outside[g] : 0;
    for (int64_t i = 0; i < s.padded / SPAN; i++) left += s.total[i * group + g] * s.top[i * group + g];
    for (int64_t i = 0; i < chosen; i++) left -= s.mass[g * s.stride + list[i]] * s.top[list[i] / SPAN * group + g];
    others += left;
    unread[g] = left > 0 ? left * float(group) : (left == left ? 0 : left);
  }
  // the first head's masses made room for the shares: it has the rest
  const float left = missing - others;
  unread[0] = left > 0 ? left * float(group) : (left == left ? 0 : left);
}

// How many values have bits of at least `least`. Floats of one sign are ordered as their bits are.
inline int64_t count_from(const float* x, int64_t padded, int32_t least) {
  I hits = I{};
  for (int64_t i = 0; i < padded; i += NW) hits -= (I)load(x + i) >= least;
  int64_t total = 0;
  for (int lane = 0; lane < NW; lane++) total += hits[lane];
  return total;
}

// The largest bits that at least k of the values reach, by bisection: no data moves, no branch depends on it.
inline int32_t bits_of_rank(const float* x, int64_t padded, int64_t k, int32_t low) {
  int32_t high = 0x7f800000;
  while (low < high) {
    const int32_t middle = low + (high - low + 1) / 2;
    if (count_from(x, padded, middle) >= k) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// Appends the indices of values whose bits reach `least`, in order; returns the new length.
inline int64_t list_from(const float* x, int64_t padded, int32_t least, int32_t* list) {
  int64_t found = 0;
#if defined(__AVX512F__)
  __m512i index = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (int64_t i = 0; i < padded; i += 16) {
    const __mmask16 hit = _mm512_cmpge_epi32_mask(_mm512_loadu_si512(x + i), _mm512_set1_epi32(least));
    // compressing into a register and storing it whole: the store that compresses is slow on some CPUs
    _mm512_storeu_si512(list + found, _mm512_maskz_compress_epi32(hit, index));
    found += __builtin_popcount(hit);
    index = _mm512_add_epi32(index, _mm512_set1_epi32(16));
  }
#else
  for (int64_t i = 0; i < padded; i++) {
    int32_t bits;
    memcpy(&bits, x + i, 4);
    list[found] = int32_t(i);
    found += bits >= least;
  }
#endif
  return found;
}

// The k-th largest of the shares, as bits. `room` and `list` hold `padded` and a vector more.
inline int32_t share_of_rank(const float* share, int64_t padded, int64_t k, float* room, int32_t* list) {
  const int64_t sampled = 2048;
  if (padded <= 2 * sampled) return bits_of_rank(share, padded, k, 0);
  // a sample says about where the k-th lies; what lies above that, with a margin, is few
  const int64_t stride = padded / sampled;
  for (int64_t i = 0; i < sampled; i++) room[i] = share[i * stride];
  const int64_t rank = k / stride + k / (4 * stride) + 16;
  const int32_t guess = rank < sampled ? bits_of_rank(room, sampled, rank, 0) : 0;
  const int64_t left = list_from(share, padded, guess, list);
  if (left < k) return bits_of_rank(share, padded, k, 0);
  for (int64_t i = 0; i < left; i++) room[i] = share[list[i]];
  for (int64_t i = left; i % BLOCK; i++) room[i] = -1;
  return bits_of_rank(room, (left + BLOCK - 1) / BLOCK * BLOCK, k, guess);
}

// Lists the chosen of the shares in order; returns how many. Shares below 0 are no tokens.
inline int64_t choose(const float* share, int64_t padded, int64_t eligible, int64_t floor, int64_t cap, float threshold,
                      float* room, int32_t* list) {
  int32_t least = 0;
  int64_t above = 0, wanted = floor < eligible ? floor : eligible;
  if (threshold > 0) {
    memcpy(&least, &threshold, 4);
    // strictly above the threshold: from the next float on
    above = list_from(share, padded, ++least, list);
  }
  if (cap >= 0 && cap < (above > wanted ? above : wanted)) {
    wanted = cap;
  } else if (above >= wanted) {
    return above;
  }
  if (wanted == 0) return 0;
  least = wanted == eligible ? 0 : share_of_rank(share, padded, wanted, room, list);
  const int64_t found = list_from(share, padded, least, list);
  // of tokens tied with the last one, the first in the text are taken
  int64_t spare = found - wanted, kept = found;
  if (spare > 0) {
    kept = 0;
    int64_t ties = wanted - count_from(share, padded, least + 1);
    for (int64_t i = 0; i < found; i++) {
      int32_t bits;
      memcpy(&bits, share + list[i], 4);
      if (bits == least && ties-- <= 0) continue;
      list[kept++] = list[i];
    }
  }
  return kept < wanted ? kept : wanted;
}

// Beside the `chosen` tokens of `list`, in order: the tokens with which the sum of the other shares passes half a cell, one
// and a half, and so on. Writes all of them to `into`, in order, and what is added to their logits; returns how many.
inline int64_t sample_tail(const float* share, int64_t padded, float cell, const int32_t* list, int64_t chosen, int32_t* into,
                           float* log_weights) {
  int64_t found = 0, next = 0, passed = 0;
  double total = 0;
  auto put = [&](int64_t token, float log_weight) {
    into[found] = int32_t(token);
    log_weights[found++] = log_weight;
  };
  for (int64_t at = 0; at < padded; at += BLOCK) {
    const bool has_chosen = next < chosen && list[next] < at + BLOCK;
    F parts = F{};
    for (int64_t i = at; i < at + BLOCK; i += NW) {
      const F x = load(share + i);
      parts += x > F{} ? x : F{};
    }
    const double block = sum(parts);
    // nothing to read here
    if (!has_chosen && total + block <= (double(passed) + 0.499) * cell) {
      total += block;
      continue;
    }
    for (int64_t i = at; i < at + BLOCK; i++) {
      if (next < chosen && list[next] == i) {
        put(i, 0);
        next++;
      } else if (share[i] > 0) {
        total += share[i];
        if (total / cell > double(passed) + 0.5) {
          put(i, logf(cell / share[i]));
          passed = int64_t(ceil(total / cell - 0.5));
        }
      }
    }
  }
  return found;
}

}  // namespace
#endif
