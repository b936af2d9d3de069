// C = A Bᵀ for Hopper: what gemm_sm80.cuh does, with the work divided among specialists.
//
// One thread, the producer, asks TMA for tiles. Two warpgroups, the consumers, multiply them by wgmma
// straight from shared memory. They meet at two mbarriers a stage: `full`, which the bytes that arrive
// complete, and `empty`, at which the consumers say that they have read. Nobody else waits for anybody.
#pragma once

#include "device/device.cuh"

namespace almostgpt::examples {

using namespace device;

// Row-major A [m][k], B [n][k] and C [m][n] of bf16 or fp16; k and n are multiples of 8, as TMA wants
// strides of 16 bytes. What a box holds beyond the tensor reads as zero and is not written.
struct GemmSm90 {
  TensorMap a, b, c;
  int k;

  static constexpr int kConsumers = 2;           // warpgroups, 64 rows of C each
  static constexpr int kTileM = 64 * kConsumers, kTileN = 128;
  static constexpr int kSlice = 64;              // of k: 128 bytes, the widest swizzle
  static constexpr int kStages = 3;
  static constexpr int kThreads = 128 * (1 + kConsumers);
  // In shared memory: A and B of each stage, C, then the mbarriers. Tiles are multiples of 1024 bytes.
  static constexpr uint32_t kBytesA = kTileM * kSlice * 2, kBytesB = kTileN * kSlice * 2;
  static constexpr uint32_t kStageBytes = kBytesA + kBytesB;
  static constexpr uint32_t kPanelBytes = 64 * 128;  // of C: 64 rows of 64 columns
  static constexpr uint32_t kBytesC = kConsumers * kTileN / 64 * kPanelBytes;
  static constexpr uint32_t kSharedBytes = kStages * kStageBytes + kBytesC + kStages * 16;
};

struct Stage {
  shared_addr a, b, full, empty;
  uint32_t parity;  // of the use: stages are used again and again, their mbarriers' phases alternate

  DEVICE explicit Stage(int slice) {
    using Gemm = GemmSm90;
    const uint32_t index = slice % Gemm::kStages;
    a = shared_base() + index * Gemm::kStageBytes;
    b = a + Gemm::kBytesA;
    full = shared_base() + Gemm::kStages * Gemm::kStageBytes + Gemm::kBytesC + index * 16;
    empty = full + 8;
    parity = slice / Gemm::kStages % 2;
  }
};

DEVICE void produce(const GemmSm90& p, int slices) {
  using Gemm = GemmSm90;
  for (int slice = 0; slice < slices; ++slice) {
    const Stage stage(slice);
    // The first use of a stage waits for nothing: the phase before the first counts as complete.
    mbar_wait(stage.empty, stage.parity ^ 1);
    mbar_arrive_expect_tx(stage.full, Gemm::kStageBytes);
    tma_load(stage.a, &p.a, stage.full, slice * Gemm::kSlice, block_y() * Gemm::kTileM);
    tma_load(stage.b, &p.b, stage.full, slice * Gemm::kSlice, block_x() * Gemm::kTileN);
  }
}

// Rows of 128 bytes, swizzled: 8 of them are 1024 bytes, and 16 elements of k are 32 bytes along the row.
DEVICE uint64_t operand(shared_addr tile, int k) {
  return matrix_descriptor(tile + 2 * k, 16, 1024, SwizzleSpan::bytes128);
}

template <class T> DEVICE void consume(const GemmSm90& p, int slices, int consumer) {
  using Gemm = GemmSm90;
  const int lane = lane_id(), thread = thread_id() % 128;
  float c[Gemm::kTileN / 2];
  for (int slice = 0; slice < slices; ++slice) {
    const Stage stage(slice);
    mbar_wait(stage.full, stage.parity);
    keep_registers(c);
    wgmma_fence();
    UNROLL for (int k = 0; k < Gemm::kSlice; k += 16)
      wgmma_ss<T, Gemm::kTileN>(c, operand(stage.a + consumer * 64 * 128, k), operand(stage.b, k), slice > 0 || k > 0);
    wgmma_commit();
    // While these products run, those of the slice before end, and its stage is free.
    wgmma_wait<1>();
    if (slice > 0 && lane == 0) mbar_arrive(Stage(slice - 1).empty);
  }
  wgmma_wait<0>();
  keep_registers(c);

  // Through shared memory, so that TMA writes whole rows; each consumer has its own 64 x 128.
  const shared_addr tile_c = shared_base() + Gemm::kStages * Gemm::kStageBytes + consumer * 2 * Gemm::kPanelBytes;
  UNROLL for (int i = 0; i < Gemm::kTileN / 2; i += 2) {
    const int row = thread / 32 * 16 + lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2;
    const shared_addr at = tile_c + column / 64 * Gemm::kPanelBytes + row * 128 + column % 64 * 2;
    store_shared(swizzled(at, SwizzleSpan::bytes128), pair_of(T(), c[i], c[i + 1]));
  }
  fence_proxy_async();  // what this thread wrote, TMA shall read,
  bar_sync(1 + consumer, 128);  // once the other threads of the consumer have written, too
  if (thread == 0) {
    UNROLL for (int panel = 0; panel < 2; ++panel)
      tma_store(&p.c, tile_c + panel * Gemm::kPanelBytes, block_x() * Gemm::kTileN + 64 * panel,
                block_y() * Gemm::kTileM + 64 * consumer);
    tma_commit();
    tma_wait_read<0>();  // the block's shared memory must outlive the read
  }
}

template <class T> KERNEL LAUNCH_BOUNDS(GemmSm90::kThreads, 1) gemm_sm90_kernel(GRID_CONSTANT const GemmSm90 p) {
  using Gemm = GemmSm90;
  const int slices = (p.k + Gemm::kSlice - 1) / Gemm::kSlice;
  if (thread_id() == 0) {
    for (int i = 0; i < Gemm::kStages; ++i) {
      const Stage stage(i);
      mbar_init(stage.full, 1);                     // the producer, who also says how many bytes will come
      mbar_init(stage.empty, 4 * Gemm::kConsumers);  // one lane of each consumer warp
    }
    fence_mbarrier_init();
  }
  cta_sync();

  // The producer needs hardly any registers; the consumers take them over.
  const int warpgroup = shfl_idx(warp_id() / 4, 0);  // the same in all lanes, so that the compiler knows
  if (warpgroup == 0) {
    setmaxnreg_dec<24>();
    if (warp_id() == 0 && elect_one()) produce(p, slices);
  } else {
    setmaxnreg_inc<240>();
    consume<T>(p, slices, warpgroup - 1);
  }
}

// 0, or an error for error_string.
template <class T> int gemm_sm90(const T* a, const T* b, T* c, int m, int n, int k, void* stream) {
  using Gemm = GemmSm90;
  const auto map = [](TensorMap* map, const T* base, int rows, int columns, int box_rows) {
    const uint64_t dims[] = {static_cast<uint64_t>(columns), static_cast<uint64_t>(rows)};
    const uint64_t strides[] = {columns * sizeof(T)};
    const uint32_t box[] = {64, static_cast<uint32_t>(box_rows)};
    return make_tensor_map<T>(map, base, 2, dims, strides, box, SwizzleSpan::bytes128);
  };
  Gemm parameters;
  parameters.k = k;
  if (const int error = map(&parameters.a, a, m, k, Gemm::kTileM)) return error;
  if (const int error = map(&parameters.b, b, n, k, Gemm::kTileN)) return error;
  if (const int error = map(&parameters.c, c, m, n, 64)) return error;
  const auto tiles = [](int extent, int tile) { return static_cast<unsigned>((extent + tile - 1) / tile); };
  const LaunchShape shape{{tiles(n, Gemm::kTileN), tiles(m, Gemm::kTileM)}, Gemm::kThreads, Gemm::kSharedBytes};
  return launch<gemm_sm90_kernel<T>>(shape, stream, parameters);
}

}  // namespace almostgpt::examples
