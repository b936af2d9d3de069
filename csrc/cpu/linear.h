// Linear layers on a processor: y = x * weight^T + bias. Plain C++: callers divide the work among threads.
#pragma once

#include <cstdint>

#include "cpu/dots.h"

namespace almostgpt::cpu {

struct LinearShape {
  int64_t rows, inputs, outputs;  // x (rows, inputs), weight (outputs, inputs), y (rows, outputs)
};

// Rows of the weight that are worked on together; threads get whole blocks, next to each other. So many that
// a block stays in the nearest cache while all rows of x pass by.
int64_t block_outputs(int64_t inputs, int64_t weight_bytes);

// y of the outputs [begin, end). x_stride: elements from row to row of x. y is T, and so is bias, which may
// be null; float32 inside.
template <class T>
void linear_part(const DotKernels& kernels, const LinearShape& shape, const float* x, int64_t x_stride,
                 const T* weight, const T* bias, T* y, int64_t begin, int64_t end);

// Rows of x in 16 bits: codes (rows, inputs) and for each row what a unit of its codes stands for. A row
// that is not finite has zeros for codes, and a scale that is not a number.
//   scale = max |x| / 32767, codes = round(x * (32767 / max |x|)), computed in float64
template <class T>
void quantize_rows(const T* x, int64_t x_stride, int64_t rows, int64_t columns, int16_t* codes, double* scales);

// y = round(sum * (x_scale * scale) + bias), of the outputs [begin, end): the sum is exact, what follows is
// in float64, and rounded to T once. bias may be null.
template <class T>
void int8_linear_part(const DotKernels& kernels, const LinearShape& shape, const int16_t* codes,
                      const double* x_scales, const int8_t* weight, const float* scales, const float* bias, T* y,
                      int64_t begin, int64_t end);

float to_float(float x);
float to_float(bf16 x);
template <class T> T from_float(float x);

}  // namespace almostgpt::cpu
