// Attention as a ladder, for readers: the same function in four steps from the textbook to Hopper.
//
//   1  naive.cu             S = Q Kᵀ goes to global memory: three kernels, a line of the formula each
//   2  tiled.cu             FlashAttention: tiles in shared memory, a softmax that goes along, plain fp32 arithmetic
//   3  ../forward_sm80.cuh  the same on tensor cores, with copies that run ahead: kernels.flash_attention but on Hopper
//   4  ../forward_sm90.cuh  products and copies by units of their own, which some threads only feed: on Hopper
//
// Each step says what it costs, in bytes and FLOPs, and what the next one will save. The first two serve
// no model: kernels/attention_ladder.py calls them, and the third ("mma") on any card, by name;
// tests/kernels/test_attention_ladder.py counts their bytes, and benchmarks/test_attention.py times all.
#pragma once

#include <cstdint>

#include "runtime.h"

namespace almostgpt::ladder {

// Of each head by itself: out = softmax(q kᵀ scale) v, row by row. All pointers are device memory, 16-byte aligned.
struct Attention {
  const void *q, *k, *v;  // (heads, length, width), dense
  void* out;              // likewise
  int64_t heads;          // batch size times heads; heads x length < 2^31
  int64_t length;         // of queries and of keys alike
  int64_t width;          // a multiple of 8, up to 128
  DType dtype;            // of all four: bfloat16 or float16
  float scale;
  bool causal;  // query i sees the keys j <= i
};

// 0, or an error for error_string; neither waits for the GPU.
int attention_naive(const Attention& attention, float* scores /* (heads, length, length) */, void* stream);
int attention_tiled(const Attention& attention, void* stream);

}  // namespace almostgpt::ladder
