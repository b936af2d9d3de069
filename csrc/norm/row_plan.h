// How a row is spread over threads so that each of its bytes is read once: in 16-byte vectors, of which
// each warp has a run of 32 V and each lane every 32nd. So the V vectors of a thread lie at constant
// distances, which cost neither registers nor instructions. Plain C++.
#pragma once

#include <cstdint>

namespace almostgpt {

constexpr int kVectorBytes = 16;
constexpr int kMaxRowThreads = 512;
constexpr int kMaxRowVectors = 8 * kMaxRowThreads;  // 64 KiB a row: 32,768 of bf16

struct RowPlan {
  int vectors = 0;  // a thread's, a template argument of the kernels; 0: the row is too long, or shorter than one
  int threads_per_row = 0;  // whole warps
  int rows_per_block = 0;

  constexpr int threads() const { return threads_per_row * rows_per_block; }
};

constexpr RowPlan plan_row(int64_t row_vectors, int vectors) {
  if (row_vectors < 1 || row_vectors > kMaxRowVectors) return {};
  RowPlan plan;
  plan.vectors = vectors;
  const int threads = static_cast<int>((row_vectors + vectors - 1) / vectors);
  plan.threads_per_row = (threads + 31) / 32 * 32;
  plan.rows_per_block = plan.threads_per_row < 256 ? 256 / plan.threads_per_row : 1;
  return plan;
}

// A row that a warp can hold needs no barrier; and what each thread does beside its vectors is a good
// part of the kernel, so few threads with four vectors each.
constexpr RowPlan plan_forward(int64_t row_vectors) {
  return plan_row(row_vectors, row_vectors <= 32     ? 1
                               : row_vectors <= 64   ? 2
                               : row_vectors <= 96   ? 3
                               : row_vectors <= 2048 ? 4
                                                     : 8);
}

// Few vectors, since each takes a vector of sums in registers.
constexpr RowPlan plan_backward(int64_t row_vectors) {
  return plan_row(row_vectors, row_vectors <= 128    ? 1
                               : row_vectors <= 1024 ? 2
                               : row_vectors <= 2048 ? 4
                                                     : 8);
}

// Whether all rows of this matrix begin at multiples of a vector and end at one.
inline bool in_vectors(const void* data, int64_t stride, int64_t columns, int64_t element_bytes) {
  return reinterpret_cast<uintptr_t>(data) % kVectorBytes == 0 && stride * element_bytes % kVectorBytes == 0 &&
         columns * element_bytes % kVectorBytes == 0;
}

}  // namespace almostgpt
