// The ops flash_attention_forward and flash_attention_backward, on CUDA and on the emulator.
// Their schemas, fakes, autograd formulas and CPU versions are in kernels/flash_attention.py.

#include <algorithm>
#include <optional>
#include <tuple>

#include "attention/attention.h"
#include "torch/heads.h"

namespace almostgpt::binding {
namespace {

using torch::stable::clone;
using torch::stable::contiguous;
using torch::stable::new_empty;
using torch::stable::new_zeros;
using torch::stable::transpose;
using OptionalTensor = std::optional<Tensor>;

// The options as the ops take them; the tensors keep their memory alive.
struct Options {
  OptionalTensor alibi_slopes, sink_logits, cu_seqlens;
  int64_t window_left, window_right;
  double scale, softcap;
};

AttentionShape shape_of(const char* op, const Tensor& q, const Tensor& k, const Tensor& v) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && same_sizes(k, v), op, ": q, k and v must be (B, H, T, D)");
  STD_TORCH_CHECK(k.size(0) == q.size(0) && k.size(3) == q.size(3) && k.size(1) > 0 && q.size(1) % k.size(1) == 0, op,
                  ": q and k must have one batch size and head width, and heads in a whole ratio");
  const DType dtype = dtype_of(op, "q", q);
  STD_TORCH_CHECK(dtype != DType::float32, op, ": q must be bfloat16 or float16");
  STD_TORCH_CHECK(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(), op,
                  ": q, k and v must have one dtype");
  STD_TORCH_CHECK(q.size(3) % 8 == 0 && q.size(3) >= 8 && q.size(3) <= 256, op,
                  ": the head width must be a multiple of 8 up to 256");
  // The kernels count tokens and blocks in 32 bits.
  STD_TORCH_CHECK(std::max(q.size(2), k.size(2)) < (1 << 29), op, ": more than 2^29 tokens");
  const int64_t blocks = q.size(0) * q.size(1) * (std::max(q.size(2), k.size(2)) / 32 + 2);
  STD_TORCH_CHECK(blocks < (int64_t{1} << 31), op, ": more than 2^31 tiles");
  const auto size = [&](const Tensor& tensor, int64_t d) { return static_cast<int>(tensor.size(d)); };
  return {size(q, 0), size(q, 1), size(k, 1), size(q, 2), size(k, 2), size(q, 3), dtype};
}

// The sums of the parts, in float32 before they are rounded.
Tensor summed(const Tensor& heads, int64_t parts) {
  if (parts == 1) return heads;
  const Tensor in_memory = transpose(heads, 1, 2);
  const int64_t B = in_memory.size(0), T = in_memory.size(1), H = in_memory.size(2) / parts, D = in_memory.size(3);
  const Tensor apart = torch::stable::view(in_memory, {B, T, H, parts, D});
  return transpose(torch::stable::sum(apart, std::vector<int64_t>{3}, false), 1, 2);
}
Tensor zero_heads(const Tensor& like) {
  return transpose(new_zeros(like, {like.size(0), like.size(2), like.size(1), like.size(3)}), 1, 2);
}

Options check_options(Context& context, const AttentionShape& shape, const OptionalTensor& alibi_slopes,
                      const OptionalTensor& sink_logits, const OptionalTensor& cu_seqlens, int64_t window_left,
                      int64_t window_right, double scale, double softcap) {
  Options options{{}, {}, {}, window_left, window_right, scale, softcap};
  const auto per_head = [&](const char* name, const Tensor& tensor) {
    STD_TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == shape.heads && tensor.scalar_type() == ScalarType::Float,
                    context.op, ": ", name, " must be float32, one for each of ", shape.heads, " heads");
    return contiguous(tensor);
  };
  if (alibi_slopes) options.alibi_slopes = per_head("alibi_slopes", *alibi_slopes);
  if (sink_logits) options.sink_logits = per_head("sink_logits", *sink_logits);
  if (cu_seqlens) {
    STD_TORCH_CHECK(cu_seqlens->dim() == 1 && cu_seqlens->size(0) >= 2 && cu_seqlens->scalar_type() == ScalarType::Int,
                    context.op, ": cu_seqlens must be int32, (documents + 1,)");
    STD_TORCH_CHECK(shape.batch == 1 && shape.queries == shape.keys, context.op,
                    ": cu_seqlens needs a batch of 1 and as many queries as keys");
    options.cu_seqlens = contiguous(*cu_seqlens);
  }
  return options;
}

// Announces what the kernels read.
AttentionInputs inputs_of(Context& context, const AttentionShape& shape, const Options& options, const Tensor& q,
                          const Tensor& k, const Tensor& v) {
  AttentionInputs inputs{shape, {}, input(context, "q", q), input(context, "k", k), input(context, "v", v)};
  AttentionOptions& o = inputs.options;
  o.window_left = options.window_left, o.window_right = options.window_right;
  o.scale = static_cast<float>(options.scale), o.softcap = static_cast<float>(options.softcap);
  if (options.alibi_slopes) o.alibi_slopes = context.input<float>("alibi_slopes", *options.alibi_slopes);
  if (options.sink_logits) o.sink_logits = context.input<float>("sink_logits", *options.sink_logits);
  if (options.cu_seqlens) {
    o.cu_seqlens = context.input<int32_t>("cu_seqlens", *options.cu_seqlens);
    o.documents = static_cast<int>(options.cu_seqlens->size(0) - 1);
  }
  return inputs;
}

// q (B, H, Tq, D), k and v (B, Hkv, Tk, D), any strides -> out as q, laid out (B, Tq, H, D); lse (B, H, Tq), float32
std::tuple<Tensor, Tensor> forward(Context& context, const Tensor& q_, const Tensor& k_, const Tensor& v_,
                                   const OptionalTensor& alibi_slopes, const OptionalTensor& sink_logits,
                                   const OptionalTensor& cu_seqlens, int64_t window_left, int64_t window_right,
                                   double scale, double softcap, bool /*deterministic*/) {
  const AttentionShape shape = shape_of(context.op, q_, k_, v_);
  const Options options = check_options(context, shape, alibi_slopes, sink_logits, cu_seqlens, window_left,
                                        window_right, scale, softcap);
  const Tensor q = readable(q_), k = readable(k_), v = readable(v_);
  Tensor out = new_heads(q);
  Tensor lse = new_empty(q, {shape.batch, shape.heads, shape.queries}, ScalarType::Float);
  if (q.numel() == 0) return {out, lse};
  const AttentionInputs inputs = inputs_of(context, shape, options, q, k, v);
  context.check(attention_forward(inputs, output(context, "out", out), context.output<float>("lse", lse),
                                  context.stream()));
  return {out, lse};
}

// What forward took and gave, and the gradients of out and of lse (or none) -> those of q, k, v, laid out as
// out is, and of sink_logits: (H,), float32, or (0,) without
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
    Context& context, const Tensor& dout_, const OptionalTensor& dlse_, const Tensor& q_, const Tensor& k_,
    const Tensor& v_, const Tensor& out_, const Tensor& lse_, const OptionalTensor& alibi_slopes,
    const OptionalTensor& sink_logits, const OptionalTensor& cu_seqlens, int64_t window_left, int64_t window_right,
    double scale, double softcap, bool deterministic) {
  const AttentionShape shape = shape_of(context.op, q_, k_, v_);
  const Options options = check_options(context, shape, alibi_slopes, sink_logits, cu_seqlens, window_left,
                                        window_right, scale, softcap);
  const auto check_like_q = [&](const char* name, const Tensor& tensor) {
    STD_TORCH_CHECK(same_sizes(tensor, q_) && tensor.scalar_type() == q_.scalar_type(), context.op, ": ", name,
                    " must have the shape and dtype of q");
  };
  check_like_q("dout", dout_);
  check_like_q("out", out_);
  const int64_t all_rows = int64_t{shape.batch} * shape.heads * shape.queries;
  STD_TORCH_CHECK(lse_.numel() == all_rows && lse_.scalar_type() == ScalarType::Float, context.op,
                  ": lse must be float32, (B, H, Tq)");
  if (dlse_)
    STD_TORCH_CHECK(dlse_->numel() == all_rows && dlse_->scalar_type() == ScalarType::Float, context.op,
                    ": dlse must have the shape and dtype of lse");
  const Tensor q = readable(q_), k = readable(k_), v = readable(v_), out = readable(out_), dout = readable(dout_);
  const Tensor lse = contiguous(lse_);
  OptionalTensor dlse;
  if (dlse_) dlse = contiguous(*dlse_);
  if (q.numel() == 0 || k.numel() == 0) {
    // Nobody sees a key: only the sinks' own lse is there to have a gradient, and theirs is its sum.
    Tensor dsink = new_zeros(q, {options.sink_logits ? shape.heads : 0}, ScalarType::Float);
    if (options.sink_logits && dlse && dlse->numel() > 0)
      dsink = torch::stable::sum(*dlse, std::vector<int64_t>{0, 2}, false);
    return {zero_heads(q), zero_heads(k), zero_heads(v), dsink};
  }
  Tensor dsink = new_empty(q, {options.sink_logits ? shape.heads : 0}, ScalarType::Float);

  const AttentionInputs inputs = inputs_of(context, shape, options, q, k, v);
  AttentionWorkspace sizes{};
  context.check(attention_workspace(inputs, deterministic, &sizes));
  Tensor dq = new_heads(q), dk = new_heads(k, sizes.key_parts), dv = new_heads(v, sizes.key_parts);
  const auto scratch_tensor = [&](int64_t size, ScalarType type = ScalarType::Float) {
    return new_empty(q, {size}, type);
  };
  Tensor lse2 = scratch_tensor(sizes.rows), delta = scratch_tensor(sizes.rows), dq_sums = scratch_tensor(sizes.dq);
  Tensor sinks = scratch_tensor(sizes.sinks), turns = scratch_tensor(sizes.turns, ScalarType::Int);

  const AttentionGradients gradients{input(context, "out", out),
                                     input(context, "dout", dout),
                                     context.input<float>("lse", lse),
                                     dlse ? context.input<float>("dlse", *dlse) : nullptr,
                                     output(context, "dq", dq),
                                     output(context, "dk", dk),
                                     output(context, "dv", dv),
                                     options.sink_logits ? context.output<float>("dsink", dsink) : nullptr,
                                     deterministic};
  const AttentionScratch scratch{context.output<float>("lse2", lse2), context.output<float>("delta", delta),
                                 context.output<float>("dq sums", dq_sums),
                                 sizes.sinks ? context.output<float>("sinks", sinks) : nullptr,
                                 sizes.turns ? context.output<int32_t>("turns", turns) : nullptr};
  context.check(attention_backward(inputs, gradients, scratch, sizes.key_parts, context.stream()));
  return {dq, summed(dk, sizes.key_parts), summed(dv, sizes.key_parts), dsink};
}

}  // namespace

ALMOSTGPT_OPS(library) {
  implement<&forward>(library, "flash_attention_forward");
  implement<&backward>(library, "flash_attention_backward");
}

}  // namespace almostgpt::binding
