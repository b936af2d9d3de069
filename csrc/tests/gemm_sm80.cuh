// C = A Bᵀ for any GPU: the plain way from global memory through shared memory to the tensor cores.
//
// A block computes a tile of C. Along k it takes both operands in slices: cp.async brings a slice into
// shared memory while the tensor cores work on the one before. All else is about where bytes lie.
#pragma once

#include "device/device.cuh"

namespace almostgpt::examples {

using namespace device;

// Row-major A [m][k], B [n][k] and C [m][n] of bf16 or fp16; k is a multiple of 8, a row of 16-byte chunks.
template <class T> struct GemmSm80 {
  Global<const T> a, b;
  Global<T> c;
  int m, n, k;

  static constexpr int kTile = 64;   // of C, in both directions
  static constexpr int kSlice = 32;  // of k
  static constexpr int kStages = 3;  // slices in shared memory: one in use, two on their way
  static constexpr int kThreads = 128;
  static constexpr uint32_t kTileBytes = kTile * kSlice * 2;
  static constexpr uint32_t kSharedBytes = kStages * 2 * kTileBytes;
};

// Where chunk `chunk` (of 8 elements) of a tile's row lies. Rows are 64 bytes long, so a warp that reads
// one chunk of eight rows would find them in half of the banks; swizzled, they are in all.
DEVICE shared_addr chunk_address(shared_addr tile, int row, int chunk) {
  return swizzled(tile + row * 64 + chunk * 16, SwizzleSpan::bytes64);
}

// Rows first_row to first_row + 63 and columns first_k to first_k + 31 of a matrix; beyond it, zeros.
template <class T>
DEVICE void load_tile(shared_addr tile, Global<const T> matrix, int rows, int k, int first_row, int first_k) {
  using Gemm = GemmSm80<T>;
  constexpr int chunks = Gemm::kSlice / 8;
  UNROLL for (int i = thread_id(); i < Gemm::kTile * chunks; i += Gemm::kThreads) {
    const int row = first_row + i / chunks, column = first_k + i % chunks * 8;
    const bool inside = row < rows && column < k;
    // An address that is not used is still computed: keep it in the matrix.
    const Global<const T> from = inside ? matrix + (int64_t{row} * k + column) : matrix;
    cp_async16(chunk_address(tile, i / chunks, i % chunks), from, inside);
  }
}

template <class T> KERNEL LAUNCH_BOUNDS(128, 4) gemm_sm80_kernel(const GemmSm80<T> p) {
  using Gemm = GemmSm80<T>;
  const int first_m = block_y() * Gemm::kTile, first_n = block_x() * Gemm::kTile;
  const int slices = (p.k + Gemm::kSlice - 1) / Gemm::kSlice;
  const auto tile_a = [](int slice) { return shared_base() + slice % Gemm::kStages * 2 * Gemm::kTileBytes; };
  const auto tile_b = [&](int slice) { return tile_a(slice) + Gemm::kTileBytes; };
  // One group of copies a slice, though it be empty: so the newest groups can be counted.
  const auto load = [&](int slice) {
    if (slice < slices) {
      load_tile(tile_a(slice), p.a, p.m, p.k, first_m, slice * Gemm::kSlice);
      load_tile(tile_b(slice), p.b, p.n, p.k, first_n, slice * Gemm::kSlice);
    }
    cp_async_commit();
  };

  // Four warps, two by two, each with 32 x 32 of C: two rows of four 16 x 8 fragments.
  const int lane = lane_id(), warp_m = warp_id() / 2 * 32, warp_n = warp_id() % 2 * 32;
  float c[2][4][4] = {};

  for (int slice = 0; slice < Gemm::kStages - 1; ++slice) load(slice);
  for (int slice = 0; slice < slices; ++slice) {
    cp_async_wait<Gemm::kStages - 2>();
    cta_sync();  // everybody's copies of this slice are there, and nobody reads the slice before it any more …
    load(slice + Gemm::kStages - 1);  // … whose place the next one takes

    UNROLL for (int k = 0; k < Gemm::kSlice; k += 16) {
      // The four 8x8 matrices of ldmatrix are those of a fragment of A, or of two fragments of B.
      uint32_t a[2][4], b[2][4];
      UNROLL for (int i = 0; i < 2; ++i) {
        ldmatrix_x4(a[i], chunk_address(tile_a(slice), warp_m + 16 * i + lane % 16, k / 8 + lane / 16));
        ldmatrix_x4(b[i], chunk_address(tile_b(slice), warp_n + 16 * i + lane / 16 * 8 + lane % 8,
                                        k / 8 + lane / 8 % 2));
      }
      UNROLL for (int i = 0; i < 2; ++i)
        UNROLL for (int j = 0; j < 4; ++j)
          mma_m16n8k16<T>(c[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
    }
  }

  // Element by element, as n may be odd; gemm_sm90.cuh writes whole rows.
  UNROLL for (int i = 0; i < 2; ++i)
    UNROLL for (int j = 0; j < 4; ++j)
      UNROLL for (int e = 0; e < 4; ++e) {
        const int row = first_m + warp_m + 16 * i + lane / 4 + 8 * (e / 2);
        const int column = first_n + warp_n + 8 * j + 2 * (lane % 4) + e % 2;
        if (row < p.m && column < p.n) store_global(p.c + (int64_t{row} * p.n + column), round_to<T>(c[i][j][e]));
      }
}

// 0, or an error for error_string.
template <class T> int gemm_sm80(const T* a, const T* b, T* c, int m, int n, int k, void* stream) {
  using Gemm = GemmSm80<T>;
  const auto tiles = [](int extent) { return static_cast<unsigned>((extent + Gemm::kTile - 1) / Gemm::kTile); };
  const LaunchShape shape{{tiles(n), tiles(m)}, Gemm::kThreads, Gemm::kSharedBytes};
  const Gemm parameters{Global<const T>(a), Global<const T>(b), Global<T>(c), m, n, k};
  return launch<gemm_sm80_kernel<T>>(shape, stream, parameters);
}

}  // namespace almostgpt::examples
