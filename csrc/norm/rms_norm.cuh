// What the forward and the backward kernels of RMSNorm share.
#pragma once

#include "device/device.cuh"
#include "norm/rms_norm.h"
#include "norm/row_plan.h"

namespace almostgpt {

using namespace device;

// A matrix of rows in global memory, as a kernel takes it.
template <class T>
struct RowsOf {
  Global<const T> data;
  int64_t stride;

  DEVICE Global<const T> row(int64_t index) const { return data + index * stride; }
};

template <class T>
RowsOf<T> rows_of(ConstRows rows) {
  return {Global<const T>(static_cast<const T*>(rows.data)), rows.stride};
}

// Where the threads of a block are, as a kernel takes it: divisions are done once, on the host.
struct RowThreads {
  int threads_per_row = 0, rows_per_block = 1;
  uint32_t reciprocal = 0;  // 2^16 over a row's warps, rounded up: exact for the 16 warps of a block
  float inverse_columns = 0.0f;

  // Which of the block's rows is this thread's, and its number within it.
  DEVICE int place() const { return warp_id() * reciprocal >> 16; }
  DEVICE int thread() const { return thread_id() - place() * threads_per_row; }
};
// The first of the V vectors of a row's thread; each of the others is 32 further.
template <int V>
DEVICE int first_vector(int thread) {
  return thread / 32 * (32 * V) + lane_id();
}

inline RowThreads row_threads(const RowPlan& plan, int64_t columns) {
  return {plan.threads_per_row, plan.rows_per_block, 65536u / (plan.threads_per_row / 32) + 1,
          1.0f / static_cast<float>(columns)};
}
// A row a block, for the kernels that take any row.
inline RowThreads block_threads(int64_t columns) {
  RowThreads rows;
  rows.threads_per_row = columns < 1024 ? 128 : kMaxRowThreads;
  rows.inverse_columns = 1.0f / static_cast<float>(columns);
  return rows;
}

// Shared memory of a row_sum: one float a warp.
constexpr uint32_t kSumsBytes = kMaxRowThreads / 32 * 4;

// The sum over the `threads` threads of a row, of which this one is number `thread`, in all of them,
// added in a fixed order. A block may hold several rows; all its threads call. One barrier: a caller
// that loops alternates between two places for the sums, since a warp may be a whole round ahead of
// another that still reads.
DEVICE float row_sum(float value, int threads, int thread, shared_addr sums) {
  value = warp_sum(value);
  if (threads == 32) return value;
  if (lane_id() == 0) store_shared<float>(sums + 4 * warp_id(), value);
  cta_sync();
  const int first = warp_id() - thread / 32, lane = lane_id() % 16;
  return warp_sum<16>(lane < threads / 32 ? load_shared<float>(sums + 4 * (first + lane)) : 0.0f);
}

// Calls f with a T and a W, the C++ types of the rows and of the weight.
template <class F>
int with_types(const RmsNormShape& shape, F f) {
  const bool wide = shape.weight_dtype == DType::float32;
  switch (shape.dtype) {
    case DType::float32: return f(float(), float());
    case DType::bfloat16: return wide ? f(bf16(), float()) : f(bf16(), bf16());
    case DType::float16: return wide ? f(fp16(), float()) : f(fp16(), fp16());
  }
  return 0;
}

// Calls f with the number of vectors, one of the options, as a constant.
template <int... options, class F>
int with_vectors(int vectors, F f) {
  int result = 0;
  (void)((vectors == options && (result = f(std::integral_constant<int, options>()), true)) || ...);
  return result;
}

// kVectorWidth<T> elements of the weight, whatever its own type, still packed.
template <class T, class W>
struct WeightVector {
  static constexpr int width = kVectorWidth<W>, parts = kVectorWidth<T> / width;
  u32x4 packed[parts];

  template <Cache cache = Cache::read_only>
  DEVICE void load(Global<const W> weight) {
    UNROLL for (int i = 0; i < parts; ++i) packed[i] = load_global_as<u32x4, cache>(weight + i * width);
  }
  DEVICE void unpack_to(float (&values)[kVectorWidth<T>]) const {
    UNROLL for (int i = 0; i < parts; ++i) {
      float part[width];
      unpack<W>(packed[i], part);
      UNROLL for (int j = 0; j < width; ++j) values[i * width + j] = part[j];
    }
  }
};

inline unsigned ceil_div(int64_t a, int64_t b) { return static_cast<unsigned>((a + b - 1) / b); }

}  // namespace almostgpt
