// The sketch's rotation: random signs, a Hadamard butterfly, a cosine transform over the odd part of D.
#ifndef SAD_ROTATE_H
#define SAD_ROTATE_H

#include "kernels.h"
#include "simd.h"

namespace {

inline void butterfly(float* x, int dim, int power, float scale) {
  for (int half = 1; half < power; half *= 2)
    for (int at = 0; at < dim; at += 2 * half)
      for (int i = at; i < at + half; i++) {
        const float first = x[i], second = x[i + half];
        x[i] = first + second;
        x[i + half] = first - second;
      }
  for (int i = 0; i < dim; i++) x[i] *= scale;
}

// Single additions in the order of reference.rotate, so that a key gets the same bits there and here.
inline void rotate(const float* rotation, float* x, int dim) {
  const float scale = rotation[0], *signs = rotation + 1, *cosine = rotation + 1 + dim;
  const int power = dim & -dim, odd = dim / power;
  for (int i = 0; i < dim; i++) x[i] *= signs[i];
  butterfly(x, dim, power, scale);
  if (odd == 1) return;
  if (dim <= 0 || dim > SAD_MOST_DIM) __builtin_unreachable();
  float blocks[SAD_MOST_DIM];
  memcpy(blocks, x, dim * sizeof(float));
  for (int row = 0; row < odd; row++)
    for (int i = 0; i < power; i++) {
      float mixed = cosine[row * odd] * blocks[i];
      for (int part = 1; part < odd; part++) mixed = mixed + cosine[row * odd + part] * blocks[part * power + i];
      x[row * power + i] = mixed;
    }
}

// Undoes it: the same steps from the last to the first, each its own inverse but for the cosines.
inline void unrotate(const float* rotation, float* x, int dim) {
  const float scale = rotation[0], *signs = rotation + 1, *cosine = rotation + 1 + dim;
  const int power = dim & -dim, odd = dim / power;
  if (dim <= 0 || dim > SAD_MOST_DIM) __builtin_unreachable();
  if (odd > 1) {
    float blocks[SAD_MOST_DIM];
    memcpy(blocks, x, dim * sizeof(float));
    for (int row = 0; row < odd; row++)
      for (int i = 0; i < power; i++) {
        float mixed = cosine[row] * blocks[i];
        for (int part = 1; part < odd; part++) mixed = mixed + cosine[part * odd + row] * blocks[part * power + i];
        x[row * power + i] = mixed;
      }
  }
  butterfly(x, dim, power, scale);
  for (int i = 0; i < dim; i++) x[i] *= signs[i];
}

template <class T>
inline void rotated(const sad_call* c, const T* from, float* to) {
  for (int i = 0; i < c->dim; i++) to[i] = widen(from[i]);
  rotate(c->rotation, to, int(c->dim));
}

}  // namespace
#endif
