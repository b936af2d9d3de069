// Dot products of rows of a weight with a few rows of x: what a linear layer computes, and all of it
// that depends on an instruction set. dots.inl holds the one source.
#pragma once

#include <cstdint>

#include "cpu/instruction_set.h"

namespace almostgpt::cpu {

struct bf16 {
  uint16_t bits;
};

// sums[r * sums_stride + n] = sum over k of weight[n * columns + k] * x[r * x_stride + k],
// for n < weight_rows and r < rows.
template <class Weight, class X, class Sum>
using Dots = void (*)(const Weight* weight, int64_t weight_rows, int64_t columns, const X* x, int64_t x_stride,
                      int64_t rows, Sum* sums, int64_t sums_stride);

// The order of a sum depends on `columns` alone, so not on the rows that are computed together.
struct DotKernels {
  Dots<float, float, float> float32;
  Dots<bf16, float, float> bfloat16;
  Dots<int8_t, float, float> int8_float32;
  // The exact sums, so the same of every instruction set. x: within -32767 ... 32767.
  Dots<int8_t, int16_t, int64_t> int8;
};

const DotKernels& dot_kernels(InstructionSet set);  // one that is available

// What each instruction set gives; only those that the library was compiled for exist.
extern const DotKernels kPortableDots, kAvx2Dots, kAvx512Dots;

}  // namespace almostgpt::cpu
