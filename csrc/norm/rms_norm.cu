// RMSNorm, plainly: one block a row, each thread every blockDim.x-th element of it.
//
// The weight's gradient is a sum over all rows. Atomics would add in a new order every run, so each
// block sums a chunk of rows into a row of its own in a workspace, and one last kernel adds those
// up in order: the same bits every time.

#include "norm/rms_norm.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

namespace almostgpt {
namespace {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 256;
constexpr int64_t kMaxBlocks = 1 << 16;  // more rows than this: a block takes several
constexpr int kTileRows = 8;             // rows that a block of the weight's gradient adds at a time
constexpr int64_t kMaxChunks = 256;      // rows of the workspace

// The sum over the block's threads, in all of them, added in a fixed order.
__device__ float block_sum(float value) {
  __shared__ float warp_sums[kMaxThreads / kWarp];
  for (int offset = kWarp / 2; offset > 0; offset /= 2)
    value += __shfl_xor_sync(0xffffffffu, value, offset);
  __syncthreads();  // the previous sum has been read by everyone
  if (threadIdx.x % kWarp == 0) warp_sums[threadIdx.x / kWarp] = value;
  __syncthreads();
  float total = 0.0f;
  for (unsigned warp = 0; warp < blockDim.x / kWarp; ++warp) total += warp_sums[warp];
  return total;
}

template <typename T, typename W>
__global__ void __launch_bounds__(kMaxThreads)
    forward_kernel(const T* __restrict__ x, int64_t x_stride, const W* __restrict__ weight,
                   float eps, T* __restrict__ y, float* __restrict__ rstd, int64_t rows,
                   int64_t columns) {
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const T* x_row = x + row * x_stride;
    T* y_row = y + row * columns;
    float squares = 0.0f;
    for (int64_t c = threadIdx.x; c < columns; c += blockDim.x) {
      const float value = static_cast<float>(x_row[c]);
      squares += value * value;
    }
    const float r = rsqrtf(block_sum(squares) / static_cast<float>(columns) + eps);
    if (threadIdx.x == 0) rstd[row] = r;
    for (int64_t c = threadIdx.x; c < columns; c += blockDim.x)
      y_row[c] = static_cast<T>(static_cast<float>(x_row[c]) * r * static_cast<float>(weight[c]));
  }
}

// dx = rstd * (dy * weight - x_hat * mean(dy * weight * x_hat)),  x_hat = x * rstd
template <typename T, typename W>
__global__ void __launch_bounds__(kMaxThreads)
    backward_kernel(const T* __restrict__ dy, int64_t dy_stride, const T* __restrict__ x,
                    int64_t x_stride, const W* __restrict__ weight, const float* __restrict__ rstd,
                    T* __restrict__ dx, int64_t rows, int64_t columns) {
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const T* dy_row = dy + row * dy_stride;
    const T* x_row = x + row * x_stride;
    T* dx_row = dx + row * columns;
    const float r = rstd[row];
    float products = 0.0f;
    for (int64_t c = threadIdx.x; c < columns; c += blockDim.x)
      products += static_cast<float>(dy_row[c]) * static_cast<float>(weight[c]) *
                  (static_cast<float>(x_row[c]) * r);
    const float mean = block_sum(products) / static_cast<float>(columns);
    for (int64_t c = threadIdx.x; c < columns; c += blockDim.x) {
      const float upstream = static_cast<float>(dy_row[c]) * static_cast<float>(weight[c]);
      const float x_hat = static_cast<float>(x_row[c]) * r;
      dx_row[c] = static_cast<T>(r * (upstream - x_hat * mean));
    }
  }
}

// Block (i, j): columns 32 i ... 32 i + 31, every gridDim.y-th group of kTileRows rows from j on.
template <typename T>
__global__ void __launch_bounds__(kWarp* kTileRows)
    weight_partial_kernel(const T* __restrict__ dy, int64_t dy_stride, const T* __restrict__ x,
                          int64_t x_stride, const float* __restrict__ rstd,
                          float* __restrict__ partial, int64_t rows, int64_t columns) {
  __shared__ float sums[kTileRows][kWarp];
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kWarp + threadIdx.x;
  float sum = 0.0f;
  if (c < columns) {
    const int64_t step = static_cast<int64_t>(gridDim.y) * kTileRows;
    for (int64_t row = static_cast<int64_t>(blockIdx.y) * kTileRows + threadIdx.y; row < rows;
         row += step)
      sum += static_cast<float>(dy[row * dy_stride + c]) *
             (static_cast<float>(x[row * x_stride + c]) * rstd[row]);
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y == 0 && c < columns) {
    for (int lane = 1; lane < kTileRows; ++lane) sum += sums[lane][threadIdx.x];
    partial[blockIdx.y * columns + c] = sum;
  }
}

template <typename W>
__global__ void __launch_bounds__(kMaxThreads)
    weight_sum_kernel(const float* __restrict__ partial, int64_t partial_rows,
                      W* __restrict__ dweight, int64_t columns) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (c >= columns) return;
  float sum = 0.0f;
  for (int64_t row = 0; row < partial_rows; ++row) sum += partial[row * columns + c];
  dweight[c] = static_cast<W>(sum);
}

unsigned ceil_div(int64_t a, int64_t b) { return static_cast<unsigned>((a + b - 1) / b); }

unsigned row_blocks(int64_t rows) {
  return static_cast<unsigned>(rows < kMaxBlocks ? rows : kMaxBlocks);
}

// Whole warps, about four elements a thread.
int row_threads(int64_t columns) {
  int threads = kWarp;
  while (threads < kMaxThreads && threads * 4 < columns) threads *= 2;
  return threads;
}

// Calls f with null pointers of the C++ types of x and weight.
template <typename F>
int with_types(const RmsNormShape& shape, F f) {
  const bool wide = shape.weight_dtype == DType::float32;
  float* f32 = nullptr;
  __nv_bfloat16* bf16 = nullptr;
  __half* f16 = nullptr;
  if (!wide && shape.weight_dtype != shape.dtype) return cudaErrorInvalidValue;
  switch (shape.dtype) {
    case DType::float32: return f(f32, f32);
    case DType::bfloat16: return wide ? f(bf16, f32) : f(bf16, bf16);
    case DType::float16: return wide ? f(f16, f32) : f(f16, f16);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

int rms_norm_forward(const RmsNormShape& shape, const void* x, int64_t x_stride, const void* weight,
                     float eps, void* y, float* rstd, void* stream) {
  if (shape.rows == 0) return cudaSuccess;
  return with_types(shape, [&](auto* t, auto* w) -> int {
    using T = std::remove_pointer_t<decltype(t)>;
    using W = std::remove_pointer_t<decltype(w)>;
    forward_kernel<T, W>
        <<<row_blocks(shape.rows), row_threads(shape.columns), 0, static_cast<cudaStream_t>(stream)>>>(
            static_cast<const T*>(x), x_stride, static_cast<const W*>(weight), eps,
            static_cast<T*>(y), rstd, shape.rows, shape.columns);
    return cudaGetLastError();
  });
}

int64_t rms_norm_partial_rows(int64_t rows) {
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  return tiles < kMaxChunks ? tiles : kMaxChunks;
}

int rms_norm_backward(const RmsNormShape& shape, const void* dy, int64_t dy_stride, const void* x,
                      int64_t x_stride, const void* weight, const float* rstd, void* dx,
                      void* dweight, float* partial, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  const int64_t chunks = rms_norm_partial_rows(shape.rows);
  return with_types(shape, [&](auto* t, auto* w) -> int {
    using T = std::remove_pointer_t<decltype(t)>;
    using W = std::remove_pointer_t<decltype(w)>;
    const T* dy_t = static_cast<const T*>(dy);
    const T* x_t = static_cast<const T*>(x);
    if (shape.rows > 0) {
      backward_kernel<T, W><<<row_blocks(shape.rows), row_threads(shape.columns), 0, s>>>(
          dy_t, dy_stride, x_t, x_stride, static_cast<const W*>(weight), rstd,
          static_cast<T*>(dx), shape.rows, shape.columns);
      if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
      const dim3 grid(ceil_div(shape.columns, kWarp), static_cast<unsigned>(chunks));
      weight_partial_kernel<T><<<grid, dim3(kWarp, kTileRows), 0, s>>>(
          dy_t, dy_stride, x_t, x_stride, rstd, partial, shape.rows, shape.columns);
      if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
    }
    weight_sum_kernel<W><<<ceil_div(shape.columns, kMaxThreads), kMaxThreads, 0, s>>>(
        partial, chunks, static_cast<W*>(dweight), shape.columns);
    return cudaGetLastError();
  });
}

}  // namespace almostgpt
