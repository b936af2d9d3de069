// How a row is spread over threads so that each of its bytes is read once: 16-byte vectors, of which
// thread t of a row's threads has t, t + threads_per_row, t + 2 threads_per_row, …  Plain C++.
#pragma once

#include <cstdint>

namespace almostgpt {

constexpr int kVectorBytes = 16;
constexpr int kMaxRowThreads = 512;
constexpr int kMaxRowVectors = 8 * kMaxRowThreads;  // 64 KiB a row: 32,768 of bf16

struct RowPlan {
  int vectors = 0;  // a thread's: 1, 2, 4 or 8, a template argument of the kernels; 0: rows are too long (or shorter than a vector)
  int threads_per_row = 0;  // whole warps
  int rows_per_block = 0;

  constexpr int threads() const { return threads_per_row * rows_per_block; }
};

// Few vectors a thread while the row allows it: more threads keep more loads in flight.
constexpr RowPlan plan_row(int64_t row_vectors) {
  if (row_vectors < 1 || row_vectors > kMaxRowVectors) return {};
  RowPlan plan;
  plan.vectors = row_vectors <= 128                  ? 1
                 : row_vectors <= 2 * kMaxRowThreads ? 2
                 : row_vectors <= 4 * kMaxRowThreads ? 4
                                                     : 8;
  const int threads = static_cast<int>((row_vectors + plan.vectors - 1) / plan.vectors);
  plan.threads_per_row = (threads + 31) / 32 * 32;
  plan.rows_per_block = plan.threads_per_row < 256 ? 256 / plan.threads_per_row : 1;
  return plan;
}

// Whether all rows of this matrix begin at multiples of a vector and end at one.
inline bool in_vectors(const void* data, int64_t stride, int64_t columns, int64_t element_bytes) {
  return reinterpret_cast<uintptr_t>(data) % kVectorBytes == 0 && stride * element_bytes % kVectorBytes == 0 &&
         columns * element_bytes % kVectorBytes == 0;
}

}  // namespace almostgpt
