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

// The sum over the `threads` threads of one row, in all of them, added in a fixed order. A block may
// hold several rows; all its threads call. `sums`: shared memory of one float a warp of the block.
// One barrier: a caller that loops alternates between two such places, since a warp may be a
// whole round ahead of another that still reads.
DEVICE float row_sum(float value, int threads, shared_addr sums) {
  value = warp_sum(value);
  if (threads == 32) return value;
  if (lane_id() == 0) store_shared<float>(sums + 4 * warp_id(), value);
  cta_sync();
  const int warps = threads / 32, first = warp_id() / warps * warps;
  return warp_sum<kMaxRowThreads / 32>(
      lane_id() % 16 < warps ? load_shared<float>(sums + 4 * (first + lane_id() % 16)) : 0.0f);
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

// Calls f with the number of vectors as a constant.
template <class F>
int with_vectors(int vectors, F f) {
  switch (vectors) {
    case 1: return f(std::integral_constant<int, 1>());
    case 2: return f(std::integral_constant<int, 2>());
    case 4: return f(std::integral_constant<int, 4>());
    default: return f(std::integral_constant<int, 8>());
  }
}

// kVectorWidth<T> elements of the weight, whatever its own type, still packed.
template <class T, class W>
struct WeightVector {
  static constexpr int width = kVectorWidth<W>, parts = kVectorWidth<T> / width;
  u32x4 packed[parts];

  DEVICE void load(Global<const W> weight) {
    UNROLL for (int i = 0; i < parts; ++i)
      packed[i] = load_global_as<u32x4, Cache::read_only>(weight + i * width);
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
