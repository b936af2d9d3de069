// Before and after the main backward kernel: what is done once for each query.
//
//   before   delta = rowsum(out * dout) - dlse, lse in log2, zeros for dq's sums, whose turn it is;
//            for sinks, sum of exp(sink - lse) delta over 64 queries
//   after    dq = scale * its sums, rounded; dsink = minus the sum of those sums

#include "attention/backward.cuh"

namespace almostgpt {
namespace {

constexpr int kRowThreads = 256;
constexpr int kRowWarps = kRowThreads / 32;

template <class T>
struct PrepareArgs {
  HeadsOf<const T> out, dout;
  Global<const float> lse, dlse;  // (batch, heads, queries); dlse may be absent
  Global<float> lse2, delta;      // (batch, heads, padded_rows)
  Global<float> dq;               // the sums, each block's 64 rows x `width` in one piece
  Global<const float> sink_logits;
  Global<float> sinks;  // (heads, batch, blocks of rows)
  Global<int32_t> turns;
  Mask mask;
  int heads, head_dim, width, padded_rows;
  int row_lanes;  // lanes for a row, a power of two: 8 columns each
  int tile_queries, tile_keys;
};

// A block has 64 queries of a head.
template <class T>
KERNEL LAUNCH_BOUNDS(kRowThreads, 4) prepare_kernel(GRID_CONSTANT const PrepareArgs<T> a) {
  const int blocks = a.padded_rows / kRowBlock, any_head = block_x() / blocks, first = block_x() % blocks * kRowBlock;
  const int batch = any_head / a.heads, head = any_head % a.heads;
  const int64_t row_of_head = int64_t{any_head} * a.padded_rows;
  const int lane = thread_id() % a.row_lanes, rows_at_once = kRowThreads / a.row_lanes;
  const Global<const T> out = a.out.head(batch, head) + lane * 8, dout = a.dout.head(batch, head) + lane * 8;
  const bool sinks = static_cast<bool>(a.sink_logits);
  const float sink = sinks ? load_global<Cache::read_only>(a.sink_logits + head) * kLog2E : 0.0f;
  float pulled = 0.0f;
  for (int i = thread_id() / a.row_lanes; i < kRowBlock; i += rows_at_once) {
    const int row = first + i;
    const bool there = row < a.mask.queries;
    float sum = 0.0f;
    if (there && lane * 8 < a.head_dim) {
      float o[8], d[8];
      unpack<T>(load_global_as<u32x4, Cache::streaming>(out + row * a.out.strides.row), o);
      unpack<T>(load_global_as<u32x4, Cache::read_only>(dout + row * a.dout.strides.row), d);
      UNROLL for (int e = 0; e < 8; ++e) sum += o[e] * d[e];
    }
    for (int bits = a.row_lanes / 2; bits > 0; bits /= 2) sum += shfl_xor(sum, bits);
    if (lane > 0) continue;
    const int64_t at = int64_t{any_head} * a.mask.queries + row;
    const float lse = there ? load_global<Cache::read_only>(a.lse + at) : kMinusInfinity;
    const bool empty = lse == kMinusInfinity;
    if (there && a.dlse) sum -= load_global<Cache::read_only>(a.dlse + at);
    // A row that sees nothing has no gradient: exp2(score - infinity) is 0, and so is 0 times delta.
    const float lse2 = empty ? -kMinusInfinity : lse * kLog2E, delta = empty ? 0.0f : sum;
    store_global(a.lse2 + (row_of_head + row), lse2);
    store_global(a.delta + (row_of_head + row), delta);
    if (sinks) pulled += exp2_approx(sink - lse2) * delta;
  }

  const Global<float> dq = a.dq + (row_of_head + first) * a.width;
  for (int i = thread_id(); i < kRowBlock / 4 * a.width; i += kRowThreads)
    store_global_as<f32x4>(dq + 4 * i, f32x4{0.0f, 0.0f, 0.0f, 0.0f});
  if (a.turns && thread_id() < kRowBlock / a.tile_queries) {
    const int query = first + thread_id() * a.tile_queries;
    const int64_t tile = int64_t{any_head} * (a.padded_rows / a.tile_queries) + query / a.tile_queries;
    const int first_key = query < a.mask.queries ? a.mask.keys_of(query).begin : 0;
    store_global(a.turns + (1 + tile), first_key / a.tile_keys);
    if (tile == 0) store_global(a.turns, 0);
  }
  if (sinks) {
    pulled = warp_sum(pulled);
    if (lane_id() == 0) store_shared<float>(shared_base() + 4 * warp_id(), pulled);
    cta_sync();
    if (thread_id() > 0) return;
    for (int warp = 1; warp < kRowWarps; ++warp) pulled += load_shared<float>(shared_base() + 4 * warp);
    const int batches = grid_x() / blocks / a.heads;
    store_global(a.sinks + ((int64_t{head} * batches + batch) * blocks + first / kRowBlock), pulled);
  }
}

template <class T>
struct FinishArgs {
  Global<const float> sums;
  HeadsOf<T> dq;
  DqOrder order;
  float scale;
  int heads, queries, head_dim, width, padded_rows;
};

// A block has 64 queries of a head, a thread 8 columns of two rows at a time: 64 bytes of sums.
template <class T>
KERNEL LAUNCH_BOUNDS(kRowThreads, 4) finish_kernel(GRID_CONSTANT const FinishArgs<T> a) {
  const int blocks = a.padded_rows / kRowBlock, any_head = block_x() / blocks, first = block_x() % blocks * kRowBlock;
  const int chunks = a.width / 8;
  const Global<const float> sums = a.sums + (int64_t{any_head} * a.padded_rows + first) * a.width;
  const Global<T> dq = a.dq.head(any_head / a.heads, any_head % a.heads);
  for (int i = thread_id(); i < kRowBlock / 2 * chunks; i += kRowThreads) {
    const int chunk = i % chunks, pair = i / chunks, row = pair / 8 * 16 + pair % 8;  // and row + 8
    if (chunk * 8 >= a.head_dim) continue;
    const Global<const float> fragment = sums + (row / 16 * chunks + chunk) * 128;
    const int lane = row % 8 * 4;
    float values[2][8];
    UNROLL for (int part = 0; part < 4; ++part) {
      // The four elements of a lane, or one element of four lanes.
      const auto at = a.order.vectors ? a.order.at(lane + part, 0) : a.order.at(lane, part);
      const f32x4 found = load_global_as<f32x4, Cache::read_only>(fragment + at);
      const float four[4] = {found.x, found.y, found.z, found.w};
      UNROLL for (int k = 0; k < 4; ++k) {
        if (a.order.vectors) values[k / 2][2 * part + k % 2] = four[k] * a.scale;
        else values[part / 2][2 * k + part % 2] = four[k] * a.scale;
      }
    }
    UNROLL for (int half = 0; half < 2; ++half) {
      const int query = first + row + 8 * half;
      if (query < a.queries) store_global_as<u32x4>(dq + (query * a.dq.strides.row + chunk * 8), pack<T>(values[half]));
    }
  }
}

// A warp for each head.
KERNEL LAUNCH_BOUNDS(32, 1) sink_sum_kernel(Global<const float> sinks, Global<float> dsink, int64_t parts) {
  float sum = 0.0f;
  for (int64_t part = lane_id(); part < parts; part += 32) sum += load_global(sinks + (block_x() * parts + part));
  sum = warp_sum(sum);
  if (lane_id() == 0) store_global(dsink + block_x(), -sum);
}

template <class F>
int with_type(DType dtype, F f) {
  return dtype == DType::bfloat16 ? f(bf16()) : f(fp16());
}

unsigned blocks_of(const AttentionShape& shape, const BackwardPlan& plan) {
  return static_cast<unsigned>(int64_t{shape.batch} * shape.heads * (plan.padded_rows / kRowBlock));
}

}  // namespace

int attention_prepare_backward(const AttentionInputs& inputs, const AttentionGradients& gradients,
                               const AttentionScratch& scratch, const BackwardPlan& plan, void* stream) {
  const AttentionShape& shape = inputs.shape;
  return with_type(shape.dtype, [&](auto type) {
    using T = decltype(type);
    PrepareArgs<T> args{};
    args.out = heads_of<T>(gradients.out), args.dout = heads_of<T>(gradients.dout);
    args.lse = Global<const float>(gradients.lse), args.dlse = Global<const float>(gradients.dlse);
    args.lse2 = Global<float>(scratch.lse2), args.delta = Global<float>(scratch.delta);
    args.dq = Global<float>(scratch.dq);
    args.sink_logits = Global<const float>(inputs.options.sink_logits), args.sinks = Global<float>(scratch.sinks);
    args.turns = Global<int32_t>(gradients.deterministic ? scratch.turns : nullptr);
    args.mask = make_mask(shape, inputs.options);
    args.heads = shape.heads, args.head_dim = shape.head_dim;
    args.width = plan.width, args.padded_rows = plan.padded_rows, args.row_lanes = plan.width / 8;
    args.tile_queries = plan.tile_queries, args.tile_keys = plan.tile_keys;
    const LaunchShape launch_shape{{blocks_of(shape, plan)}, kRowThreads, 4 * kRowWarps};
    return launch<prepare_kernel<T>>(launch_shape, stream, args);
  });
}

int attention_finish_backward(const AttentionInputs& inputs, const AttentionGradients& gradients,
                              const AttentionScratch& scratch, const BackwardPlan& plan, void* stream) {
  const AttentionShape& shape = inputs.shape;
  const int error = with_type(shape.dtype, [&](auto type) {
    using T = decltype(type);
    const FinishArgs<T> args{Global<const float>(scratch.dq), heads_of<T>(gradients.dq), plan.dq_order,
                             inputs.options.scale, shape.heads, shape.queries, shape.head_dim, plan.width,
                             plan.padded_rows};
    return launch<finish_kernel<T>>(LaunchShape{{blocks_of(shape, plan)}, kRowThreads}, stream, args);
  });
  if (error || !gradients.dsink) return error;
  const int64_t parts = int64_t{shape.batch} * (plan.padded_rows / kRowBlock);
  return launch<sink_sum_kernel>(LaunchShape{{static_cast<unsigned>(shape.heads)}, 32}, stream,
                                 Global<const float>(scratch.sinks), Global<float>(gradients.dsink), parts);
}

}  // namespace almostgpt
