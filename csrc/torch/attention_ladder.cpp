// The ops attention_ladder_naive, _tiled and _mma, on CUDA and on the emulator.
// Their schemas, fakes and CPU versions are in kernels/attention_ladder.py.

#include "attention/ladder/ladder.h"

#include <limits>

#include "torch/heads.h"

namespace almostgpt::binding {
namespace {

using torch::stable::contiguous;
using torch::stable::new_empty;

void check(const char* op, const Tensor& q, const Tensor& k, const Tensor& v) {
  STD_TORCH_CHECK(q.dim() == 4 && same_sizes(q, k) && same_sizes(q, v), op,
                  ": q, k and v must be (B, H, T, D), all alike");
  STD_TORCH_CHECK(q.scalar_type() == k.scalar_type() && q.scalar_type() == v.scalar_type() &&
                      dtype_of(op, "q", q) != DType::float32,
                  op, ": q, k and v must all be bfloat16, or all float16");
  STD_TORCH_CHECK(q.size(3) % 8 == 0 && q.size(3) >= 8 && q.size(3) <= 128, op,
                  ": the width must be a multiple of 8 from 8 to 128, not ", q.size(3));
  constexpr int64_t most = std::numeric_limits<int>::max();
  STD_TORCH_CHECK(q.numel() / q.size(3) <= most, op, ": more than ", most, " queries");
}

ladder::Attention attention(Context& context, const Tensor& q, const Tensor& k, const Tensor& v,
                            const Tensor& out, double scale, bool causal) {
  return {context.input("q", q),
          context.input("k", k),
          context.input("v", v),
          context.output("out", out),
          q.size(0) * q.size(1),
          q.size(2),
          q.size(3),
          dtype_of(context.op, "q", q),
          static_cast<float>(scale),
          causal};
}

// q, k, v (B, H, T, D), any strides -> out alike, contiguous
Tensor naive(Context& context, const Tensor& q, const Tensor& k, const Tensor& v, double scale, bool causal) {
  check(context.op, q, k, v);
  const Tensor dense_q = contiguous(q), dense_k = contiguous(k), dense_v = contiguous(v);
  Tensor out = new_empty(q, q.sizes());
  Tensor scores = new_empty(q, {q.size(0), q.size(1), q.size(2), q.size(2)}, ScalarType::Float);
  context.check(ladder::attention_naive(attention(context, dense_q, dense_k, dense_v, out, scale, causal),
                                        context.output<float>("scores", scores), context.stream()));
  return out;
}

Tensor tiled(Context& context, const Tensor& q, const Tensor& k, const Tensor& v, double scale, bool causal) {
  check(context.op, q, k, v);
  const Tensor dense_q = contiguous(q), dense_k = contiguous(k), dense_v = contiguous(v);
  Tensor out = new_empty(q, q.sizes());
  context.check(ladder::attention_tiled(attention(context, dense_q, dense_k, dense_v, out, scale, causal),
                                        context.stream()));
  return out;
}

// In place, whatever the strides, as flash_attention reads: so that the two can be compared.
Tensor mma(Context& context, const Tensor& q_, const Tensor& k_, const Tensor& v_, double scale, bool causal) {
  check(context.op, q_, k_, v_);
  Tensor out = new_empty(q_, q_.sizes());
  if (q_.numel() == 0) return out;
  const Tensor q = readable(q_), k = readable(k_), v = readable(v_);
  Tensor lse = new_empty(q, {q.size(0), q.size(1), q.size(2)}, ScalarType::Float);
  const auto size = [&](int64_t d) { return static_cast<int>(q.size(d)); };
  const AttentionShape shape{size(0), size(1), size(1), size(2), size(2), size(3), dtype_of(context.op, "q", q)};
  AttentionInputs inputs{shape, {}, input(context, "q", q), input(context, "k", k), input(context, "v", v)};
  inputs.options.scale = static_cast<float>(scale);
  if (causal) inputs.options.window_right = 0;
  context.check(attention_forward_mma(inputs, output(context, "out", out), context.output<float>("lse", lse),
                                      context.stream()));
  return out;
}

}  // namespace

ALMOSTGPT_OPS(library) {
  implement<&naive>(library, "attention_ladder_naive");
  implement<&tiled>(library, "attention_ladder_tiled");
  implement<&mma>(library, "attention_ladder_mma");
}

}  // namespace almostgpt::binding
