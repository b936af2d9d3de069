// A product with a weight of 8 bits, for the few rows of a decoding step:
//
//   y[m][n] = scales[n] * sum over k of x[m][k] * weight[n][k] + bias[n]
//
// Pointers are device memory. Sums are float32, and y is rounded to x's type once. The launcher returns 0
// or an error for error_string, and does not wait for the GPU.
#pragma once

#include <cstdint>

#include "runtime.h"

namespace almostgpt {

constexpr int kInt8LinearRows = 16;     // of x, at most: two fragments of a tensor core's instruction
constexpr int kInt8LinearColumns = 16;  // their number is a multiple of what one load of a weight brings

struct Int8LinearShape {
  int rows;          // M, 0 to kInt8LinearRows
  int64_t outputs;   // N, below 2^31
  int columns;       // K, a positive multiple of kInt8LinearColumns
  DType dtype;       // of x and y: bfloat16 or float16
  DType bias_dtype;  // dtype, or float32
};

// x (M, K): rows contiguous and `x_stride` elements apart, from multiples of 16 bytes; weight (N, K), dense,
// from a multiple of 16 bytes; scales (N,); bias (N,) or null; y (M, N), dense.
int int8_linear(const Int8LinearShape& shape, const void* x, int64_t x_stride, const int8_t* weight,
                const float* scales, const void* bias, void* y, void* stream);

}  // namespace almostgpt
