// What attention over a cache needs beside the dot products of dots.h: exponentials, sums of values, rotations.
#pragma once

#include <cstdint>

#include "cpu/instruction_set.h"

namespace almostgpt::cpu {

// sums[r * columns + c] += sum over n of weights[r * weights_stride + n] * values[n * columns + c],
// for n < keys and r < rows; columns: a multiple of 16.
template <class Value>
using AddWeighted = void (*)(const float* weights, int64_t weights_stride, int64_t rows, const Value* values,
                             int64_t keys, int64_t columns, float* sums);

struct AttentionKernels {
  AddWeighted<float> float32;
  AddWeighted<int8_t> int8;
  // scores[i] = exp(scores[i] - largest), and their sum; 0 of what is below -87. No score is above `largest`.
  float (*exponentials)(float* scores, int64_t count, float largest);
  // y[i] = x[i] c[i] - x[i + half] s[i], y[i + half] = x[i + half] c[i] + x[i] s[i]: the first product rounded,
  // the second added to it without, where there are such instructions. kernels/rope.py gives the same bits.
  void (*turn)(const float* x, const float* cosines, const float* sines, int64_t half, float* y);
};

const AttentionKernels& attention_kernels(InstructionSet set);  // one that is available

// What each instruction set gives; only those that the library was compiled for exist.
extern const AttentionKernels kPortableAttention, kAvx2Attention, kAvx512Attention;

}  // namespace almostgpt::cpu
