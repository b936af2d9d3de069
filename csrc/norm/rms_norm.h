// RMSNorm on a matrix of rows:  rstd = 1/sqrt(mean(x^2) + eps),  y = x * rstd * weight.
//
// Pointers are device memory. A row is contiguous; rows of x and dy lie a stride (in elements, any
// value from 0 up) apart; y and dx are dense. Arithmetic is float32 whatever the types.
// The launchers return a cudaError_t (0 is success) and do not wait for the GPU.
#pragma once

#include <cstdint>

#include "runtime.h"

namespace almostgpt {

struct RmsNormShape {
  int64_t rows;     // >= 0
  int64_t columns;  // >= 1
  DType dtype;         // of x, y, dy, dx
  DType weight_dtype;  // of weight and dweight: dtype, or float32
};

int rms_norm_forward(const RmsNormShape& shape, const void* x, int64_t x_stride, const void* weight,
                     float eps, void* y, float* rstd, void* stream);

// Rows of the float32 workspace (that many, columns) that the weight's gradient is summed in.
int64_t rms_norm_partial_rows(int64_t rows);

int rms_norm_backward(const RmsNormShape& shape, const void* dy, int64_t dy_stride, const void* x,
                      int64_t x_stride, const void* weight, const float* rstd, void* dx,
                      void* dweight, float* partial, void* stream);

}  // namespace almostgpt
