// Products against sums in double, and each row against itself alone.
#ifndef SAD_TESTS_PRODUCTS_H
#define SAD_TESTS_PRODUCTS_H

#include "plain.h"

namespace {

// [rows, columns] of `type`, rows `stride` elements apart, and the same in double
struct Matrix {
  int64_t type, columns, stride;
  Block<char> block;
  std::vector<double> plain;

  Matrix(int64_t type, int64_t rows, int64_t columns, int64_t gap = 0)
      : type(type), columns(columns), stride(columns + gap), block((rows - 1) * stride + columns, bits_of(type) / 8) {
    for (int64_t i = 0; i < rows * columns; i++) {
      plain.push_back(number());
      put(at(i / columns, i % columns), type, plain.back());
    }
  }
  char* at(int64_t row, int64_t i) const { return block.data + (row * stride + i) * (bits_of(type) / 8); }
};

// the product of `count` rows of x from `first` on
Block<char> product_of(const Matrix& x, int64_t first, int64_t count, const Matrix& w, int64_t rows, const Matrix* bias,
                       int64_t threads) {
  Block<char> output(count * rows, bits_of(w.type) / 8);
  sad_product product = {};
  product.count = count, product.rows = rows, product.columns = w.columns, product.threads = threads;
  product.type = w.type, product.input = x.at(first, 0), product.matrix = w.block.data, product.matrix_row = w.stride;
  product.bias = bias ? bias->block.data : nullptr, product.output = output.data;
  expect(sad_multiply(&product) == SAD_OK, "multiply fails");
  return output;
}

void check_product(int64_t type, int64_t rows, int64_t columns, int64_t count, int64_t gap, bool biased,
                   int64_t threads) {
  about = std::string(sad_isa()) + " type " + std::to_string(type) + " rows " + std::to_string(rows) + " columns " +
          std::to_string(columns) + " count " + std::to_string(count) + " threads " + std::to_string(threads);
  const Matrix x(type, count, columns), w(type, rows, columns, gap), bias(type, 1, rows);
  const Matrix* added = biased ? &bias : nullptr;
  const int64_t element = bits_of(type) / 8;
  const Block<char> all = product_of(x, 0, count, w, rows, added, threads);
  // sums are exact in float32, so only the last rounding is left
  const double place = type == SAD_FLOAT32 ? 0 : type == SAD_FLOAT16 ? 1 / 2048.0 : 1 / 256.0;
  for (int64_t r = 0; r < count; r++) {
    for (int64_t n = 0; n < rows; n++) {
      double wanted = biased ? bias.plain[n] : 0;
      for (int64_t i = 0; i < columns; i++) wanted += x.plain[r * columns + i] * w.plain[n * columns + i];
      expect_near(get(all.data + (r * rows + n) * element, type), wanted, fabs(wanted) * place, "multiply");
    }
    const Block<char> alone = product_of(x, r, 1, w, rows, added, 1);
    expect(!memcmp(alone.data, all.data + r * rows * element, size_t(rows * element)), "multiply: a row alone");
  }
  // what is no number is of no consequence to others
  const double bad[] = {NAN, INFINITY, -INFINITY};
  const int64_t spoilt = upto(count - 1);
  put(x.at(spoilt, upto(columns - 1)), type, bad[upto(2)]);
  const Block<char> found = product_of(x, 0, count, w, rows, added, threads);
  for (int64_t r = 0; r < count; r++)
    expect(r == spoilt || !memcmp(found.data + r * rows * element, all.data + r * rows * element, size_t(rows * element)),
           "multiply: poisoned");
}

// around four rows and 64, every number of inputs, and enough to be shared out
void check_products(int64_t threads) {
  const int64_t sizes[] = {8, 24, 40, 72, 576, 2056};
  int64_t turn = 0;
  for (int64_t rows : {1, 3, 4, 5, 63, 64, 65, 129})
    for (int64_t columns : sizes)
      for (int64_t type = SAD_FLOAT32; type <= SAD_FLOAT16; type++) {
        check_product(type, rows, columns, 1 + turn % 16, turn % 5, turn % 2, threads);
        turn++;
      }
  const Matrix w(SAD_FLOAT32, 5, 8), none(SAD_FLOAT32, 1, 8);
  product_of(none, 0, 0, w, 5, nullptr, threads);
}

}  // namespace
#endif
