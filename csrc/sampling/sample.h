// From logits to the next token of each sequence: what a draw is, is said in kernels/sample.py.
//
// Pointers are device memory. A row of logits is contiguous and begins anywhere that an element may. The
// launcher returns 0 or an error for error_string, does not wait for the GPU, and reads all that changes
// from token to token there, so that a CUDA graph can hold it.
#pragma once

#include <cstdint>

#include "runtime.h"

namespace almostgpt {

struct SampleInputs {
  int rows, length;  // of logits; both >= 1, length <= 2^24
  DType dtype;
  const void* logits;
  int64_t stride;  // elements from one row to the next
  const int64_t *positions, *seeds, *sequences;  // (rows,)
};

struct SampleOptions {
  float temperature;  // 0: the largest logit; else at least 1e-10
  int top_k;          // 0: all
  float top_p;        // 1: all
  float min_p;        // 0: all
  float repetition_penalty;  // 1: none
};

struct SampleOutputs {
  int64_t* ids;     // (rows,)
  float* logprobs;  // (rows,), or null
  uint8_t* seen;    // (rows, length) of 0 and 1, read and written, or null
  int64_t seen_stride;
};

int sample(const SampleInputs& inputs, const SampleOptions& options, const SampleOutputs& outputs, void* stream);

}  // namespace almostgpt
