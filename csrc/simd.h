// One float vector as wide as the instruction set, and what the kernels need of it.
//
// GNU vectors rather than intrinsics wherever both give the same code. The width must follow the
// instruction set: GCC takes a vector wider than the registers apart into scalars, 15 times slower.
// Everything is in an unnamed namespace: the same source is compiled once per instruction set, and
// no linker may pick one set's copy for another.
#ifndef SAD_SIMD_H
#define SAD_SIMD_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

// loops over registers: rolled, they would keep their vectors in memory
#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

namespace {

#if defined(__AVX512F__)
constexpr int NW = 16;
#elif defined(__AVX2__)
constexpr int NW = 8;
#else
constexpr int NW = 4;
#endif

typedef float F __attribute__((vector_size(NW * 4)));
typedef int32_t I __attribute__((vector_size(NW * 4)));
typedef uint32_t U __attribute__((vector_size(NW * 4)));

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};
// channels of a packed row: one in a byte, or two; what they are multiplied by is the row's
struct i8 {
  int8_t step;
};
struct i4 {
  uint8_t pair;
};
template <class T>
constexpr bool is_packed = false;
template <>
constexpr bool is_packed<i8> = true;
template <>
constexpr bool is_packed<i4> = true;

// bytes of `count` channels, and where channel i, an even one, of a row is
template <class T>
inline int bytes_of(int count) {
  return count * int(sizeof(T));
}
template <>
inline int bytes_of<i4>(int count) {
  return count / 2;
}
template <class T>
inline const T* at(const T* row, int64_t i) {
  return row + i;
}
inline const i4* at(const i4* row, int64_t i) { return row + i / 2; }
// a single channel, in steps
inline float step_of(const i8* row, int i) { return float(row[i].step); }
inline float step_of(const i4* row, int i) { return float((row[i / 2].pair >> (i % 2 * 4) & 15) - 8); }

inline F load(const float* p) {
  F v;
  memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, F v) { memcpy(p, &v, sizeof v); }
inline F splat(float x) { return x - F{}; }

inline float widen(float x) { return x; }
inline float widen(bf16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float y;
  memcpy(&y, &bits, 4);
  return y;
}
inline float widen(f16 x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#elif defined(__aarch64__)
  __fp16 h;
  memcpy(&h, &x.bits, 2);
  return h;
#else
  // subnormal halves come out of the same product: 2^112 rebuilds the exponent
  uint32_t bits = uint32_t(x.bits & 0x7fff) << 13, scale = 0x77800000;
  float y, factor;
  memcpy(&y, &bits, 4);
  memcpy(&factor, &scale, 4);
  y *= factor;
  if ((x.bits & 0x7c00) == 0x7c00) {
    bits = 0x7f800000u | (uint32_t(x.bits & 0x3ff) << 13);
    memcpy(&y, &bits, 4);
  }
  return x.bits & 0x8000 ? -y : y;
#endif
}

inline void narrow(float x, float* out) { *out = x; }
inline void narrow(float x, bf16* out) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  // to nearest, ties to even; NaN must not round into infinity
  out->bits = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline void narrow(float x, f16* out) {
#if defined(__F16C__)
  out->bits = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__aarch64__)
  __fp16 h = x;
  memcpy(&out->bits, &h, 2);
#else
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const uint16_t sign = (bits >> 16) & 0x8000;
  float size = fabsf(x);
  if (x != x) {
    out->bits = sign | 0x7e00;
  } else if (size >= 65520.0f) {
    out->bits = sign | 0x7c00;
  } else if (size < 6.103515625e-05f) {
    // subnormal: an addition aligns the binary point, and rounds on the way
    float aligned = size + 0.5f;
    memcpy(&bits, &aligned, 4);
    out->bits = sign | uint16_t(bits - 0x3f000000u);
  } else {
    memcpy(&bits, &size, 4);
    bits += 0xfff + ((bits >> 13) & 1);
    out->bits = sign | uint16_t((bits - 0x38000000u) >> 13);
  }
#endif
}

// Rows of keys and values are read two vectors at a time. bfloat16 comes as its even and its odd
// elements, which costs one shift and one mask; what it meets must be in the same order, see `place`.
struct Pair {
  F a, b;
};
constexpr int PAIR = 2 * NW;

inline Pair load_pair(const float* p) { return {load(p), load(p + NW)}; }
inline Pair load_pair(const bf16* p) {
  U x;
  memcpy(&x, p, sizeof x);
  return {(F)(x << 16), (F)(x & 0xffff0000u)};
}
inline Pair load_pair(const f16* p) {
#if defined(__AVX512F__)
  const __m256i* q = reinterpret_cast<const __m256i*>(p);
  return {(F)_mm512_cvtph_ps(_mm256_loadu_si256(q)), (F)_mm512_cvtph_ps(_mm256_loadu_si256(q + 1))};
#elif defined(__AVX2__)
  const __m128i* q = reinterpret_cast<const __m128i*>(p);
  return {(F)_mm256_cvtph_ps(_mm_loadu_si128(q)), (F)_mm256_cvtph_ps(_mm_loadu_si128(q + 1))};
#else
  Pair y;
  for (int i = 0; i < NW; i++) {
    y.a[i] = widen(p[i]);
    y.b[i] = widen(p[NW + i]);
  }
  return y;
#endif
}
inline Pair load_pair(const i8* p) {
#if defined(__AVX512F__)
  const __m128i* q = reinterpret_cast<const __m128i*>(p);
  return {(F)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(q))),
          (F)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(q + 1)))};
#elif defined(__AVX2__)
  const __m128i row = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {(F)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(row)),
          (F)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_unpackhi_epi64(row, row)))};
#else
  Pair y;
  for (int i = 0; i < NW; i++) {
    y.a[i] = step_of(p, i);
    y.b[i] = step_of(p, NW + i);
  }
  return y;
#endif
}
// as bfloat16 do, these come as the even and the odd
inline Pair load_pair(const i4* p) {
#if defined(__AVX512F__)
  const __m512 steps = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
  const __m512i both = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  // the look-up takes the low four bits by itself
  return {(F)_mm512_permutexvar_ps(both, steps), (F)_mm512_permutexvar_ps(_mm512_srli_epi32(both, 4), steps)};
#elif defined(__AVX2__)
  const __m256i both = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  const __m256i low = _mm256_and_si256(both, _mm256_set1_epi32(15)), centre = _mm256_set1_epi32(8);
  return {(F)_mm256_cvtepi32_ps(_mm256_sub_epi32(low, centre)),
          (F)_mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_srli_epi32(both, 4), centre))};
#else
  Pair y;
  for (int i = 0; i < NW; i++) {
    y.a[i] = step_of(p, 2 * i);
    y.b[i] = step_of(p, 2 * i + 1);
  }
  return y;
#endif
}
// the last n < PAIR elements of a row; n is a multiple of 8, the rest reads as 0 (of four bits as anything finite)
template <class T>
inline Pair load_rest(const T* p, int n) {
  T row[PAIR] = {};
  for (int i = 0; i < n; i += 8) memcpy(const_cast<T*>(at(row, i)), at(p, i), size_t(bytes_of<T>(8)));
  return load_pair(row);
}
// where element i of a pair sits among its 2 * NW lanes
template <class T>
inline int place(int i) {
  return i;
}
template <>
inline int place<bf16>(int i) {
  return i / 2 + (i % 2) * NW;
}
template <>
inline int place<i4>(int i) {
  return place<bf16>(i);
}

// sums of four vectors
struct Sums {
  float of[4];
};
inline Sums sum_each(F a, F b, F c, F d) {
  Sums s;
#if defined(__AVX512F__)
  __m512 x = _mm512_add_ps(_mm512_unpacklo_ps((__m512)a, (__m512)b), _mm512_unpackhi_ps((__m512)a, (__m512)b));
  __m512 y = _mm512_add_ps(_mm512_unpacklo_ps((__m512)c, (__m512)d), _mm512_unpackhi_ps((__m512)c, (__m512)d));
  x = _mm512_add_ps(_mm512_shuffle_ps(x, y, 0x44), _mm512_shuffle_ps(x, y, 0xee));
  __m256 z = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
  _mm_storeu_ps(s.of, _mm_add_ps(_mm256_castps256_ps128(z), _mm256_extractf128_ps(z, 1)));
#elif defined(__AVX2__)
  __m256 x = _mm256_add_ps(_mm256_unpacklo_ps((__m256)a, (__m256)b), _mm256_unpackhi_ps((__m256)a, (__m256)b));
  __m256 y = _mm256_add_ps(_mm256_unpacklo_ps((__m256)c, (__m256)d), _mm256_unpackhi_ps((__m256)c, (__m256)d));
  x = _mm256_add_ps(_mm256_shuffle_ps(x, y, 0x44), _mm256_shuffle_ps(x, y, 0xee));
  _mm_storeu_ps(s.of, _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1)));
#else
  const F of[4] = {a, b, c, d};
  for (int k = 0; k < 4; k++) s.of[k] = (of[k][0] + of[k][1]) + (of[k][2] + of[k][3]);
#endif
  return s;
}
// an order of additions that takes a few steps, not NW
inline float sum(F v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  const Sums four = sum_each(v, F{}, F{}, F{});
  return four.of[0];
#endif
}
inline float largest(F v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#else
  float m = v[0];
  for (int i = 1; i < NW; i++) m = v[i] > m ? v[i] : m;
  return m;
#endif
}

// e^x for x <= 88, two ulp; below -87.3, where float32 ends, 0; NaN stays NaN
inline F exp(F x) {
#if defined(__AVX512F__)
  // max gives its second operand where one is NaN
  const __m512 y = _mm512_max_ps(_mm512_set1_ps(-104.0f), (__m512)x);
  const F n = (F)_mm512_roundscale_ps(_mm512_mul_ps(y, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
  F r = (F)y;
#else
  const F least = splat(-87.3f), magic = splat(12582912.0f);
  F r = x > least ? x : least;
  const F whole = r * 1.44269504f + magic, n = whole - magic;
#endif
  // log 2 in two parts, the first short enough for an exact product
  r = r - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  F p = 1.0f / 120 + r * (1.0f / 720);
  p = 1.0f / 24 + r * p;
  p = 1.0f / 6 + r * p;
  p = 0.5f + r * p;
  p = 1.0f + r * p;
  p = 1.0f + r * p;
#if defined(__AVX512F__)
  return (F)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  const F scaled = (F)((I)p + ((I)whole << 23));
  return x > least ? scaled : (x == x ? F{} : x);
#endif
}

// into the second cache: a tile and its successor overflow the first
inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }
inline void prefetch_row(const void* p, int bytes) {
  const char* c = static_cast<const char*>(p);
  for (int at = 0; at < bytes; at += 64) prefetch(c + at);
  // a row that does not start on a cache line ends on one more
  prefetch(c + bytes - 1);
}

}  // namespace
#endif
