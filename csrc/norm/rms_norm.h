// RMSNorm on a matrix of rows, with or without a residual that is added first:
//
//   sum = x + residual (rounded to x's type),   rstd = 1/sqrt(mean(sum^2) + eps),   y = sum * rstd * weight
//
// Pointers are device memory. A row is contiguous; rows of an input lie a stride apart (in elements,
// any value from 0 up); y, sum and dx are dense. Arithmetic is float32 whatever the types. The
// launchers return 0 or an error for error_string, and do not wait for the GPU.
#pragma once

#include <cstdint>

#include "runtime.h"

namespace almostgpt {

struct RmsNormShape {
  int64_t rows;        // >= 0, below 2^31
  int64_t columns;     // >= 1, below 2^31
  DType dtype;         // of x, residual, y, sum, dy, dsum, dx
  DType weight_dtype;  // of weight and dweight: dtype, or float32
};

struct ConstRows {
  const void* data = nullptr;  // null: absent
  int64_t stride = 0;
};

// y (rows, columns), rstd (rows,); with a residual also sum (rows, columns), otherwise null.
int rms_norm_forward(const RmsNormShape& shape, ConstRows x, ConstRows residual, const void* weight, float eps,
                     void* y, void* sum, float* rstd, void* stream);

// Rows of the float32 workspace (that many, columns) that the weight's gradient is summed in.
int rms_norm_partial_rows(const RmsNormShape& shape, int64_t* rows);

// From x, what was normalised (sum, with a residual), and the upstream gradients dy of y and dsum of sum
// (or absent): dx = d(loss)/d(x), which is that of the residual too, and dweight. The same bits every run.
int rms_norm_backward(const RmsNormShape& shape, ConstRows dy, ConstRows dsum, ConstRows x, const void* weight,
                      const float* rstd, void* dx, void* dweight, float* partial, void* stream);

}  // namespace almostgpt
