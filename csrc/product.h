// A matrix times a few rows: what a decode step spends on a linear layer. It is read from memory once, by all threads.
#ifndef SAD_PRODUCT_H
#define SAD_PRODUCT_H

#include "parallel.h"
#include "unit.h"

namespace {

// Rows of the matrix, and rows of the input, whose products are made side by side. An element of the output is one sum in
// one order whatever these are, so it does not depend on what is multiplied beside it.
constexpr int ABREAST = 4, INPUTS = NW == 16 ? 4 : 2;
// rows of the matrix in a work item; bytes of it from which on threads help; how far ahead it is fetched: less, and the
// hardware's own look-ahead ends with every page
constexpr int64_t ROWS_AN_ITEM = 64, THREADED_BYTES = 64 << 10, AHEAD_BYTES = 16384;
// columns that are added up before their sum joins the others'
constexpr int64_t PIECE = 64 * PAIR;

// Sums [R][ABREAST] of R inputs, `stride` apart, and rows of a matrix. They are added up in pieces: in one chain, those of
// ten thousand columns are less exact than PyTorch's.
template <class T, int R>
inline void multiply(const float* x, int64_t stride, const T* const (&rows)[ABREAST], int64_t columns, Sums* sums) {
  F total[R][ABREAST] = {};
  for (int64_t at = 0; at < columns;) {
    const int64_t end = columns - at < PIECE ? columns : at + PIECE;
    F part[R][ABREAST] = {};
    auto add = [&](const Pair (&w)[ABREAST]) {
      UNROLL for (int r = 0; r < R; r++) {
        const F a = load(x + r * stride + at), b = load(x + r * stride + at + NW);
        UNROLL for (int n = 0; n < ABREAST; n++) part[r][n] += a * w[n].a;
        UNROLL for (int n = 0; n < ABREAST; n++) part[r][n] += b * w[n].b;
      }
    };
    for (; at + PAIR <= end; at += PAIR) {
      Pair w[ABREAST];
      UNROLL for (int n = 0; n < ABREAST; n++) {
        for (int line = 0; line < PAIR * int(sizeof(T)); line += 64)
          prefetch(reinterpret_cast<const char*>(rows[n] + at) + AHEAD_BYTES + line);
        w[n] = load_pair(rows[n] + at);
      }
      add(w);
    }
    if (at < end) {
      Pair w[ABREAST];
      UNROLL for (int n = 0; n < ABREAST; n++) w[n] = load_rest(rows[n] + at, int(end - at));
      add(w);
      at = end;
    }
    UNROLL for (int r = 0; r < R; r++)
      UNROLL for (int n = 0; n < ABREAST; n++) total[r][n] += part[r][n];
  }
  UNROLL for (int r = 0; r < R; r++) sums[r] = sum_each(total[r][0], total[r][1], total[r][2], total[r][3]);
}

template <class T>
inline void multiply_some(int64_t inputs, const float* x, int64_t stride, const T* const (&rows)[ABREAST],
                          int64_t columns, Sums* sums) {
  if (inputs == 1) return multiply<T, 1>(x, stride, rows, columns, sums);
  if (inputs == 2) return multiply<T, 2>(x, stride, rows, columns, sums);
  if (inputs == 3) return multiply<T, INPUTS == 4 ? 3 : 2>(x, stride, rows, columns, sums);
  return multiply<T, INPUTS>(x, stride, rows, columns, sums);
}

template <class T>
int product(const sad_product* c) {
  // no scratch is no failure then
  if (!c->count) return SAD_OK;
  const int64_t stride = lanes(c->columns);
  float* x = static_cast<float*>(sad_scratch(size_t(c->count * stride) * sizeof(float)));
  if (!x) return SAD_NO_MEMORY;
  memset(x, 0, size_t(c->count * stride) * sizeof(float));
  for (int64_t r = 0; r < c->count; r++) {
    const T* row = static_cast<const T*>(c->input) + r * c->columns;
    for (int64_t i = 0; i < c->columns; i++) x[r * stride + i / PAIR * PAIR + place<T>(int(i % PAIR))] = widen(row[i]);
  }
  const T* matrix = static_cast<const T*>(c->matrix);
  const T* bias = static_cast<const T*>(c->bias);
  const int64_t bytes = c->rows * c->columns * int64_t(sizeof(T)), items = (c->rows + ROWS_AN_ITEM - 1) / ROWS_AN_ITEM;
  each(bytes < THREADED_BYTES ? 1 : c->threads, items, [&](int64_t item) {
    const int64_t end = (item + 1) * ROWS_AN_ITEM < c->rows ? (item + 1) * ROWS_AN_ITEM : c->rows;
    for (int64_t n = item * ROWS_AN_ITEM; n < end; n += ABREAST) {
      const int64_t count = end - n < ABREAST ? end - n : ABREAST;
      const T* rows[ABREAST];
      for (int64_t i = 0; i < ABREAST; i++) rows[i] = matrix + (n + (i < count ? i : count - 1)) * c->matrix_row;
      for (int64_t from = 0; from < c->count; from += INPUTS) {
        const int64_t inputs = c->count - from < INPUTS ? c->count - from : INPUTS;
        Sums sums[INPUTS];
        multiply_some<T>(inputs, x + from * stride, stride, rows, c->columns, sums);
        for (int64_t r = 0; r < inputs; r++)
          for (int64_t i = 0; i < count; i++)
            narrow(sums[r].of[i] + (bias ? widen(bias[n + i]) : 0.0f),
                   static_cast<T*>(c->output) + (from + r) * c->rows + n + i);
      }
    }
  });
  return SAD_OK;
}

}  // namespace
#endif
