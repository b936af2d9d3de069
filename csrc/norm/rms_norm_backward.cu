// RMSNorm backward. With x_hat = x rstd and, over one row, mean = sum(dy weight x_hat) / columns:
//
//   dx      = rstd (dy weight - x_hat mean) + dsum
//   dweight = sum over rows of dy x_hat
//
// The weight's gradient is a sum over all rows. Atomics would add in a new order every run, so each
// block sums the rows that it takes into a row of its own in a workspace, and a last kernel adds
// those up in order: the same bits every time.

#include "norm/rms_norm.cuh"

namespace almostgpt {
namespace {

template <class T, class W>
struct BackwardArgs {
  RowsOf<T> dy, dsum, x;  // dsum may be absent
  Global<const W> weight;
  Global<const float> rstd;
  Global<T> dx;           // dense
  Global<float> partial;  // (blocks, columns)
  Global<float> dots;     // (rows,), of the kernels for any row
  int64_t rows;
  int columns;
  RowThreads threads;
  int stages, tensors;  // of the ring
  // From a block's row to its next: rows, and elements. Constants, so that they take no registers.
  int step;
  int64_t dy_step, dsum_step, x_step, dx_step;
};

// --- rows of 16-byte vectors that fit into shared memory ------------------------------------------------

// A persistent grid: each block takes every grid_x-th group of rows. Rows are fetched one round ahead
// into a ring of `stages` in shared memory by cp.async, which needs no registers for the bytes under
// way, and no barrier: every thread fetches just the vectors that it will use itself.
//
// Bytes under way on an H200, to cover 4.8 TB/s times about 0.7 us of latency = 25 KB an SM: at 4096
// columns of bf16, 4 blocks x 16 KB.
//
// The hot loop is near the limit of instructions that a multiprocessor issues. So addresses go on by a
// step a round (computed anew they were a third of it), and whether there is a dsum is a template argument.
HOST_DEVICE constexpr uint32_t ring_bytes(int threads, int vectors, int stages, int tensors) {
  return static_cast<uint32_t>(stages * tensors * vectors * threads) * kVectorBytes;
}

template <class T, class W, int V, bool has_dsum>
KERNEL LAUNCH_BOUNDS(kMaxRowThreads, V <= 2 ? 2 : 1) backward_kernel(GRID_CONSTANT const BackwardArgs<T, W> a) {
  constexpr int width = kVectorWidth<T>;
  constexpr bool keep_weight = V == 1;  // in a register or two; else from the L1 cache each time
  const int thread = a.threads.thread(), place = a.threads.place();
  const int rows = static_cast<int>(a.rows), row_of_thread = block_x() * a.threads.rows_per_block + place;
  const int offset = first_vector<V>(thread) * width;  // of the thread's first vector in a row
  constexpr int jump = 32 * width;                     // from one of its vectors to the next
  const auto in_row = [&](int j) { return offset + j * jump < a.columns; };

  // The ring: each warp has its own, in which vector j of tensor 0 (dy), 1 (x) or 2 (dsum) of a lane is at
  // stage + slot(tensor, j); neighbours are side by side, so no banks conflict.
  const bool ahead = a.stages == 2, staged_dsum = a.tensors == 3;
  const uint32_t stage_bytes = ring_bytes(32, V, 1, a.tensors), warp_bytes = a.stages * stage_bytes;
  const auto ring_of = [&](int warp) { return shared_base() + warp * warp_bytes + lane_id() * kVectorBytes; };
  constexpr auto slot = [](int tensor, int j) { return (tensor * V + j) * (32 * kVectorBytes); };
  const shared_addr ring = ring_of(warp_id());
  const uint32_t other_stage = ahead ? stage_bytes : 0;  // from either stage to the other: this minus it
  uint32_t stage = 0;
  const shared_addr sums = shared_base() + block_size() / 32 * warp_bytes;
  uint32_t which_sums = 0;  // alternates: see row_sum

  Global<const T> dy_next = a.dy.row(row_of_thread) + offset, x_next = a.x.row(row_of_thread) + offset;
  Global<const T> dsum_next = a.dsum.row(row_of_thread) + offset;
  Global<T> dx = a.dx + static_cast<int64_t>(row_of_thread) * a.columns + offset;
  float rstd_fetched = 0.0f;
  // Of that row, the one after the last; past the end nothing.
  const auto fetch = [&](int row, shared_addr to) {
    const bool there = row < rows;
    rstd_fetched = there ? load_global<Cache::read_only>(a.rstd + row) : 0.0f;
    UNROLL for (int j = 0; j < V; ++j) {
      if (!there || !in_row(j)) continue;
      cp_async16(to + slot(0, j), dy_next + j * jump);
      cp_async16(to + slot(1, j), x_next + j * jump);
      if (has_dsum && staged_dsum) cp_async16(to + slot(2, j), dsum_next + j * jump);
    }
    cp_async_commit();
    dy_next = dy_next + a.dy_step;
    x_next = x_next + a.x_step;
    if (has_dsum && staged_dsum) dsum_next = dsum_next + a.dsum_step;
  };

  const Global<const W> weight = a.weight + offset;
  const auto load_weight = [&](int j) {
    WeightVector<T, W> vector;
    // As read_only the compiler would take them for constants of the loop, and run out of registers.
    vector.template load<Cache::normal>(weight + j * jump);
    return vector;
  };
  WeightVector<T, W> kept = {};
  if constexpr (keep_weight) {
    if (in_row(0)) kept = load_weight(0);
  }
  const auto operands = [&](int j, float (&dy)[width], float (&x)[width], float (&w)[width]) {
    unpack<T>(load_shared<u32x4>(ring + stage + slot(0, j)), dy);
    unpack<T>(load_shared<u32x4>(ring + stage + slot(1, j)), x);
    (keep_weight ? kept : load_weight(j)).unpack_to(w);
  };

  float dweight[V][width];
  UNROLL for (int j = 0; j < V; ++j) UNROLL for (int i = 0; i < width; ++i) dweight[j][i] = 0.0f;

  fetch(row_of_thread, ring);
  for (int row = row_of_thread; row - place < rows; row += a.step) {  // as often for all threads of the block
    const bool there = row < rows;
    const float rstd = rstd_fetched;
    if (ahead) {
      fetch(row + a.step, ring + (other_stage - stage));
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    float dot = 0.0f;
    UNROLL for (int j = 0; j < V; ++j) {
      if (!there || !in_row(j)) continue;
      float dy[width], x[width], w[width];
      operands(j, dy, x, w);
      UNROLL for (int i = 0; i < width; ++i) dot += dy[i] * w[i] * x[i];
    }
    const float total = row_sum(dot, a.threads.threads_per_row, thread, sums + which_sums);
    which_sums = kSumsBytes - which_sums;
    // dx = rstd dy weight - x (rstd^3 / columns) sum(dy weight x)
    const float pull = total * a.threads.inverse_columns * rstd * (rstd * rstd);
    UNROLL for (int j = 0; j < V; ++j) {
      if (!there || !in_row(j)) continue;
      float dy[width], x[width], w[width], result[width];
      operands(j, dy, x, w);
      UNROLL for (int i = 0; i < width; ++i) {
        const float scaled = dy[i] * rstd;
        dweight[j][i] += scaled * x[i];
        result[i] = scaled * w[i] - pull * x[i];
      }
      if constexpr (has_dsum) {
        float more[width];
        unpack<T>(staged_dsum ? load_shared<u32x4>(ring + stage + slot(2, j))
                              : load_global_as<u32x4, Cache::streaming>(dsum_next + j * jump),
                  more);
        UNROLL for (int i = 0; i < width; ++i) result[i] += more[i];
      }
      store_global_as<u32x4>(dx + j * jump, pack<T>(result));
    }
    dx = dx + a.dx_step;
    if (has_dsum && !staged_dsum) dsum_next = dsum_next + a.dsum_step;
    if (!ahead) fetch(row + a.step, ring);
    stage = other_stage - stage;
  }

  // The sums of the block's rows side by side are added in order, by the threads of the first. Each
  // thread puts its own where its ring was, four columns at a time.
  constexpr int quarters = width / 4;
  if constexpr (V <= 2) {  // longer rows are alone in their block: row_plan.h
    const auto spot = [&](int at, int quarter) {
      return ring_of((at * a.threads.threads_per_row + thread) / 32) + slot(0, 1) * quarter;
    };
    if (place > 0) {
      UNROLL for (int j = 0; j < V; ++j) UNROLL for (int q = 0; q < quarters; ++q) {
        const float* d = &dweight[j][4 * q];
        store_shared(spot(place, j * quarters + q), f32x4{d[0], d[1], d[2], d[3]});
      }
    }
    cta_sync();
    if (place > 0) return;
    UNROLL_BY(1)  // once a block: four times the code for the sake of nothing
    for (int other = 1; other < a.threads.rows_per_block; ++other) {
      UNROLL for (int j = 0; j < V; ++j) UNROLL for (int q = 0; q < quarters; ++q) {
        const f32x4 more = load_shared<f32x4>(spot(other, j * quarters + q));
        float* d = &dweight[j][4 * q];
        d[0] += more.x, d[1] += more.y, d[2] += more.z, d[3] += more.w;
      }
    }
  }
  const Global<float> partial = a.partial + static_cast<int64_t>(block_x()) * a.columns;
  UNROLL for (int j = 0; j < V; ++j) {
    if (!in_row(j)) continue;
    UNROLL for (int q = 0; q < quarters; ++q) {
      const float* d = &dweight[j][4 * q];
      store_global_as<f32x4>(partial + offset + j * jump + 4 * q, f32x4{d[0], d[1], d[2], d[3]});
    }
  }
}

// --- any row: element by element, everything read twice -------------------------------------------------------

constexpr int kTileColumns = 32;
constexpr int kTileRows = 8;

// Each row's sum of dy weight x.
template <class T, class W>
KERNEL LAUNCH_BOUNDS(kMaxRowThreads, 2) row_dots_kernel(GRID_CONSTANT const BackwardArgs<T, W> a) {
  const int64_t row = block_x();
  const Global<const T> dy = a.dy.row(row), x = a.x.row(row);
  float dot = 0.0f;
  for (int c = thread_id(); c < a.columns; c += block_size())
    dot += to_float(load_global<Cache::read_only>(dy + c)) * to_float(load_global<Cache::read_only>(a.weight + c)) *
           to_float(load_global<Cache::read_only>(x + c));
  const float total = row_sum(dot, a.threads.threads_per_row, thread_id(), shared_base());
  if (thread_id() == 0) store_global(a.dots + row, total);
}

// Block (i, j): columns 32 i to 32 i + 31 of every grid_y-th group of 8 rows from j on; with the dots
// known, dx and the weight's gradient come from the same read.
template <class T, class W>
KERNEL LAUNCH_BOUNDS(kTileColumns* kTileRows, 4) columns_kernel(GRID_CONSTANT const BackwardArgs<T, W> a) {
  const int tile_row = thread_id() / kTileColumns;
  const int c = block_x() * kTileColumns + thread_id() % kTileColumns;
  float dweight = 0.0f;
  if (c < a.columns) {
    const float weight = to_float(load_global<Cache::read_only>(a.weight + c));
    for (int64_t row = static_cast<int64_t>(block_y()) * kTileRows + tile_row; row < a.rows;
         row += static_cast<int64_t>(grid_y()) * kTileRows) {
      const float rstd = load_global<Cache::read_only>(a.rstd + row);
      const float mean = load_global<Cache::read_only>(a.dots + row) * rstd * a.threads.inverse_columns;
      const float dy = to_float(load_global<Cache::read_only>(a.dy.row(row) + c));
      const float x_hat = to_float(load_global<Cache::read_only>(a.x.row(row) + c)) * rstd;
      float dx = rstd * (dy * weight - x_hat * mean);
      if (a.dsum.data) dx += to_float(load_global<Cache::read_only>(a.dsum.row(row) + c));
      store_global(a.dx + row * a.columns + c, round_to<T>(dx));
      dweight += dy * x_hat;
    }
  }
  store_shared<float>(shared_base() + 4 * thread_id(), dweight);
  cta_sync();
  if (tile_row > 0 || c >= a.columns) return;
  UNROLL for (int other = 1; other < kTileRows; ++other)
    dweight += load_shared<float>(shared_base() + 4 * (other * kTileColumns + thread_id()));
  store_global(a.partial + static_cast<int64_t>(block_y()) * a.columns + c, dweight);
}

// --- the sum of the workspace's rows ----------------------------------------------------------------------------

// A block takes 32 columns; each of its warps every 16th row of the workspace, and then the first adds
// the warps' sums, always in the same order.
constexpr int kSumWarps = 16;

template <class W>
KERNEL LAUNCH_BOUNDS(32 * kSumWarps, 2) weight_sum_kernel(Global<const float> partial, int64_t partial_rows,
                                                          Global<W> dweight, int columns) {
  const int c = block_x() * 32 + lane_id();
  float sum = 0.0f;
  if (c < columns) {
    for (int64_t row = warp_id(); row < partial_rows; row += kSumWarps)
      sum += load_global<Cache::streaming>(partial + row * columns + c);
  }
  store_shared<float>(shared_base() + 4 * thread_id(), sum);
  cta_sync();
  if (warp_id() > 0 || c >= columns) return;
  for (int warp = 1; warp < kSumWarps; ++warp) sum += load_shared<float>(shared_base() + 4 * (32 * warp + lane_id()));
  store_global(dweight + c, round_to<W>(sum));
}

// --- host ---------------------------------------------------------------------------------------------------------

// How rows in vectors are taken.
struct BackwardPlan {
  RowPlan row;
  int stages = 1, tensors = 2;  // of the ring
  int blocks = 0;               // so many rows of the workspace hold their sums
  uint32_t shared_bytes = 0;
};

int element_bytes(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

// As many blocks as run at once; but each takes four groups of rows at least where that still leaves
// no multiprocessor idle, since a block costs a row of the workspace, written and read.
int persistent_blocks(const Card& card, int64_t groups, int blocks_per_multiprocessor) {
  const int64_t resident = static_cast<int64_t>(card.multiprocessors) * blocks_per_multiprocessor;
  int64_t blocks = groups / 4 < resident ? groups / 4 : resident;
  if (blocks < card.multiprocessors) blocks = card.multiprocessors;
  return static_cast<int>(blocks < groups ? blocks : groups);
}

// The plan for rows in vectors, or one with row.vectors == 0 where a row does not fit on the card.
BackwardPlan plan_vectors(const RmsNormShape& shape, const Card& card, bool with_dsum) {
  BackwardPlan plan;
  plan.row = plan_backward(shape.columns * element_bytes(shape.dtype) / kVectorBytes);
  if (plan.row.vectors == 0) return plan;
  const int threads = plan.row.threads(), vectors = plan.row.vectors;
  const auto most = static_cast<uint32_t>(card.shared_bytes_per_block);
  const auto fits = [&](int stages, int tensors) {
    plan.stages = stages, plan.tensors = tensors;
    plan.shared_bytes = ring_bytes(threads, vectors, stages, tensors) + 2 * kSumsBytes;
    return plan.shared_bytes <= most;
  };
  const int all = with_dsum ? 3 : 2;
  if (!fits(2, all) && !fits(1, all) && !fits(1, 2)) return {};
  // LAUNCH_BOUNDS gives 64 registers a thread up to 2 vectors, 128 above; 1 KiB a block is the system's.
  const int by_registers = (vectors <= 2 ? 1024 : 512) / threads;
  const int by_memory = static_cast<int>((most + 1024) / (plan.shared_bytes + 1024));
  const int64_t groups = (shape.rows + plan.row.rows_per_block - 1) / plan.row.rows_per_block;
  plan.blocks = persistent_blocks(card, groups, max(1, min(by_registers, by_memory)));
  return plan;
}

// At least 64 rows a block, and no more blocks than keep a card busy.
int any_blocks(const RmsNormShape& shape) {
  const int64_t blocks = (shape.rows + 63) / 64;
  return static_cast<int>(blocks < 256 ? blocks : 256);
}

}  // namespace

int rms_norm_partial_rows(const RmsNormShape& shape, int64_t* rows) {
  Card card;
  if (const int error = current_card(card)) return error;
  // Either plan's sums, since the pointers that decide come later; and the dots, a float for each row.
  const int64_t dots = (shape.rows + shape.columns - 1) / shape.columns;
  *rows = max(plan_vectors(shape, card, false).blocks, any_blocks(shape)) + dots;
  return 0;
}

int rms_norm_backward(const RmsNormShape& shape, ConstRows dy, ConstRows dsum, ConstRows x, const void* weight,
                      const float* rstd, void* dx, void* dweight, float* partial, void* stream) {
  Card card;
  if (const int error = current_card(card)) return error;
  return with_types(shape, [&](auto t, auto w) -> int {
    using T = decltype(t);
    using W = decltype(w);
    const auto aligned = [&](const void* data, int64_t stride) {
      return in_vectors(data, stride, shape.columns, sizeof(T));
    };
    const bool vectors = aligned(dy.data, dy.stride) && aligned(dsum.data, dsum.stride) &&
                         aligned(x.data, x.stride) && aligned(weight, 0) && aligned(dx, shape.columns) &&
                         aligned(partial, 0);
    const BackwardPlan plan = vectors ? plan_vectors(shape, card, dsum.data != nullptr) : BackwardPlan{};
    const int64_t blocks = plan.row.vectors > 0 ? plan.blocks : any_blocks(shape);
    const int columns = static_cast<int>(shape.columns);
    BackwardArgs<T, W> args{rows_of<T>(dy), rows_of<T>(dsum), rows_of<T>(x), Global(static_cast<const W*>(weight)),
                            Global(rstd), Global(static_cast<T*>(dx)), Global(partial),
                            Global(partial + blocks * shape.columns), shape.rows, columns,
                            block_threads(columns), plan.stages, plan.tensors, 0, 0, 0, 0, 0};
    if (shape.rows > 0 && plan.row.vectors > 0) {
      args.threads = row_threads(plan.row, columns);
      args.step = static_cast<int>(blocks) * plan.row.rows_per_block;
      args.dy_step = args.step * dy.stride;
      args.dsum_step = args.step * dsum.stride;
      args.x_step = args.step * x.stride;
      args.dx_step = args.step * shape.columns;
      const LaunchShape launch_shape{{static_cast<unsigned>(blocks)}, plan.row.threads(), plan.shared_bytes};
      const int error = with_vectors<1, 2, 4, 8>(plan.row.vectors, [&](auto v) {
        constexpr int V = decltype(v)::value;
        return dsum.data ? launch<backward_kernel<T, W, V, true>>(launch_shape, stream, args)
                         : launch<backward_kernel<T, W, V, false>>(launch_shape, stream, args);
      });
      if (error) return error;
    } else if (shape.rows > 0) {
      const LaunchShape dots_shape{{static_cast<unsigned>(shape.rows)}, args.threads.threads_per_row, kSumsBytes};
      if (const int error = launch<row_dots_kernel<T, W>>(dots_shape, stream, args)) return error;
      const LaunchShape columns_shape{{ceil_div(columns, kTileColumns), static_cast<unsigned>(blocks)},
                                      kTileColumns * kTileRows, kTileColumns * kTileRows * 4};
      if (const int error = launch<columns_kernel<T, W>>(columns_shape, stream, args)) return error;
    }
    const LaunchShape sum_shape{{ceil_div(columns, 32)}, 32 * kSumWarps, 32 * kSumWarps * 4};
    return launch<weight_sum_kernel<W>>(sum_shape, stream, Global<const float>(partial), blocks,
                                        Global(static_cast<W*>(dweight)), columns);
  });
}

}  // namespace almostgpt
