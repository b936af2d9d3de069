// The ops kv_append and decode_attention, on CUDA and on the emulator.
// Their schemas, fakes and CPU versions are in kernels/kv_cache.py.

#include <optional>
#include <tuple>

#include "cache/cache.h"
#include "torch/heads.h"

namespace almostgpt::binding {
namespace {

using torch::stable::contiguous;
using torch::stable::new_empty;
using OptionalTensor = std::optional<Tensor>;

// A layer's slots (B, Hkv, C, D), written in place and so never copied; int8 with scales (B, Hkv, C).
struct Layer {
  const Tensor &keys, &values;
  const OptionalTensor &key_scales, &value_scales;
};

bool dense(const Tensor& tensor) {
  int64_t stride = 1;
  for (int64_t d = tensor.dim() - 1; d >= 0; stride *= tensor.size(d--))
    if (tensor.size(d) != 1 && tensor.stride(d) != stride) return false;
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
}

CacheShape shape_of(const char* op, const Tensor& q, const Layer& layer, int64_t sink_tokens) {
  const Tensor& keys = layer.keys;
  STD_TORCH_CHECK(q.dim() == 4 && keys.dim() == 4 && same_sizes(keys, layer.values), op,
                  ": q must be (B, H, T, D), keys and values (B, Hkv, C, D)");
  STD_TORCH_CHECK(keys.size(0) == q.size(0) && keys.size(3) == q.size(3) && keys.size(1) > 0 &&
                      q.size(1) % keys.size(1) == 0,
                  op, ": q and keys must have one batch size and head width, and heads in a whole ratio");
  const DType dtype = dtype_of(op, "q", q);
  STD_TORCH_CHECK(dtype != DType::float32, op, ": q must be bfloat16 or float16");
  STD_TORCH_CHECK(q.size(3) % 16 == 0 && q.size(3) >= 16 && q.size(3) <= 256, op,
                  ": the head width must be a multiple of 16 up to 256");
  STD_TORCH_CHECK(keys.scalar_type() == layer.values.scalar_type(), op, ": keys and values must have one dtype");
  STD_TORCH_CHECK(dense(keys) && dense(layer.values), op, ": keys and values must be dense, from a multiple of 16 bytes");
  const bool int8 = keys.scalar_type() == ScalarType::Char;
  STD_TORCH_CHECK(int8 || keys.scalar_type() == q.scalar_type(), op, ": keys must have q's dtype, or be int8");
  for (const auto* scales : {&layer.key_scales, &layer.value_scales}) {
    STD_TORCH_CHECK(scales->has_value() == int8, op, ": int8, and only int8, has scales");
    if (!int8) continue;
    const Tensor& tensor = **scales;
    STD_TORCH_CHECK(tensor.dim() == 3 && tensor.size(0) == keys.size(0) && tensor.size(1) == keys.size(1) &&
                        tensor.size(2) == keys.size(2) && tensor.scalar_type() == ScalarType::Float && dense(tensor),
                    op, ": scales must be dense float32, (B, Hkv, C)");
  }
  STD_TORCH_CHECK(keys.size(2) < (1 << 29) && q.size(2) < (1 << 29), op, ": more than 2^29 tokens");
  STD_TORCH_CHECK(sink_tokens >= 0 && sink_tokens < keys.size(2), op, ": sink_tokens must be below the capacity");
  const auto size = [](const Tensor& tensor, int64_t d) { return static_cast<int>(tensor.size(d)); };
  return {size(q, 0),    size(q, 1), size(keys, 1), size(q, 2), size(keys, 2), static_cast<int>(sink_tokens),
          size(q, 3), dtype,      int8};
}

CacheLengths lengths_of(Context& context, const Tensor& q, const Tensor& lengths, const OptionalTensor& new_lengths) {
  const auto checked = [&](const char* name, const Tensor& tensor) {
    STD_TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == q.size(0) && tensor.scalar_type() == ScalarType::Int &&
                        (tensor.size(0) == 1 || tensor.stride(0) == 1),
                    context.op, ": ", name, " must be int32, dense, one for each sequence");
    return context.input<int32_t>(name, tensor);
  };
  return {checked("lengths", lengths), new_lengths ? checked("new_lengths", *new_lengths) : nullptr};
}

// q (B, H, T, D), k and v (B, Hkv, T, D), any strides -> with turns q rotated, and with a sink_position
// of 0 or more rotated by no later a position than that, as (B, T, H, D); otherwise empty
std::tuple<Tensor, Tensor> append(Context& context, const Tensor& q_, const Tensor& k_, const Tensor& v_,
                                  const Tensor& keys, const Tensor& values, const OptionalTensor& key_scales,
                                  const OptionalTensor& value_scales, const Tensor& lengths,
                                  const OptionalTensor& new_lengths, const OptionalTensor& turns, int64_t sink_tokens,
                                  int64_t sink_position) {
  const Layer layer{keys, values, key_scales, value_scales};
  const CacheShape shape = shape_of(context.op, q_, layer, sink_tokens);
  STD_TORCH_CHECK(same_sizes(k_, v_) && k_.dim() == 4 && k_.size(0) == q_.size(0) && k_.size(1) == keys.size(1) &&
                      k_.size(2) == q_.size(2) && k_.size(3) == q_.size(3),
                  context.op, ": k and v must be (B, Hkv, T, D)");
  STD_TORCH_CHECK(k_.scalar_type() == q_.scalar_type() && v_.scalar_type() == q_.scalar_type(), context.op,
                  ": q, k and v must have one dtype");
  STD_TORCH_CHECK(shape.tokens <= shape.capacity - shape.sink_tokens, context.op, ": more tokens than slots");
  const Tensor q = readable(q_), k = readable(k_), v = readable(v_);
  Tensor q_out = turns ? new_heads(q) : new_empty(q, {0});
  Tensor q_sink = turns && sink_position >= 0 ? new_heads(q) : new_empty(q, {0});
  if (k.numel() == 0) return {q_out, q_sink};

  AppendInputs inputs{};
  inputs.shape = shape;
  inputs.lengths = lengths_of(context, q, lengths, new_lengths);
  inputs.q = input(context, "q", q), inputs.k = input(context, "k", k), inputs.v = input(context, "v", v);
  inputs.sink_position = static_cast<int>(sink_position);
  if (turns) {
    STD_TORCH_CHECK(turns->dim() == 1 && turns->size(0) > 0 && 2 * turns->size(0) <= q.size(3) && turns->scalar_type() == ScalarType::Long &&
                        dense(*turns),
                    context.op, ": turns must be int64, dense, one for each pair of dimensions at most");
    inputs.turns = context.input<uint64_t>("turns", *turns);
    inputs.pairs = static_cast<int>(turns->size(0));
  }
  const CacheSlots<void> slots{context.output("keys", keys), context.output("values", values)};
  CacheScales<float> scales{};
  if (shape.int8)
    scales = {context.output<float>("key scales", *key_scales), context.output<float>("value scales", *value_scales)};
  const Heads out = turns ? output(context, "q_out", q_out) : Heads{};
  const Heads sink = q_sink.numel() ? output(context, "q_sink", q_sink) : Heads{};
  context.check(cache_append(inputs, slots, scales, out, sink, context.stream()));
  return {q_out, q_sink};
}

// q and q_sink (B, H, T, D), any strides -> as q, laid out (B, T, H, D); tickets are zeros before and after
Tensor decode(Context& context, const Tensor& q_, const OptionalTensor& q_sink_, const Tensor& keys,
              const Tensor& values, const OptionalTensor& key_scales, const OptionalTensor& value_scales,
              const Tensor& lengths, const OptionalTensor& new_lengths, const OptionalTensor& alibi_slopes_,
              const OptionalTensor& sink_logits_, const Tensor& tickets, int64_t window, int64_t sink_tokens,
              double scale, double softcap) {
  const CacheShape shape = shape_of(context.op, q_, {keys, values, key_scales, value_scales}, sink_tokens);
  STD_TORCH_CHECK(shape.tokens <= 16, context.op, ": at most 16 tokens of a sequence");
  STD_TORCH_CHECK(window > sink_tokens && window <= shape.capacity, context.op,
                  ": the window must be above sink_tokens and within the capacity");
  const Tensor q = readable(q_);
  OptionalTensor q_sink, alibi_slopes, sink_logits;
  if (q_sink_) {
    STD_TORCH_CHECK(same_sizes(*q_sink_, q_) && q_sink_->scalar_type() == q_.scalar_type(), context.op,
                    ": q_sink must be like q");
    q_sink = readable(*q_sink_);
  }
  const auto per_head = [&](const char* name, const Tensor& tensor) {
    STD_TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == shape.heads && tensor.scalar_type() == ScalarType::Float,
                    context.op, ": ", name, " must be float32, one for each of ", shape.heads, " heads");
    return contiguous(tensor);
  };
  if (alibi_slopes_) alibi_slopes = per_head("alibi_slopes", *alibi_slopes_);
  if (sink_logits_) sink_logits = per_head("sink_logits", *sink_logits_);
  Tensor out = new_heads(q);
  if (q.numel() == 0) return out;

  DecodeInputs inputs{};
  inputs.shape = shape;
  inputs.lengths = lengths_of(context, q, lengths, new_lengths);
  inputs.window = static_cast<int>(window);
  inputs.q = input(context, "q", q);
  if (q_sink) inputs.q_sink = input(context, "q_sink", *q_sink);
  inputs.slots = {context.input("keys", keys), context.input("values", values)};
  if (shape.int8)
    inputs.scales = {context.input<float>("key scales", *key_scales), context.input<float>("value scales", *value_scales)};
  inputs.scale = static_cast<float>(scale), inputs.softcap = static_cast<float>(softcap);
  if (alibi_slopes) inputs.alibi_slopes = context.input<float>("alibi_slopes", *alibi_slopes);
  if (sink_logits) inputs.sink_logits = context.input<float>("sink_logits", *sink_logits);

  DecodeWorkspace sizes{};
  context.check(decode_workspace(inputs, &sizes));
  STD_TORCH_CHECK(tickets.dim() == 1 && tickets.size(0) >= sizes.tickets && tickets.scalar_type() == ScalarType::Int &&
                      dense(tickets),
                  context.op, ": tickets must be int32, dense, at least ", sizes.tickets);
  Tensor sums = new_empty(q, {sizes.sums}, ScalarType::Float), lse = new_empty(q, {sizes.lse}, ScalarType::Float);
  const DecodeScratch scratch{sizes.sums ? context.output<float>("sums", sums) : nullptr,
                              sizes.lse ? context.output<float>("lse", lse) : nullptr,
                              context.state<int32_t>("tickets", tickets)};
  context.check(decode_attention(inputs, scratch, output(context, "out", out), context.stream()));
  return out;
}

}  // namespace

ALMOSTGPT_OPS(library) {
  implement<&append>(library, "kv_append");
  implement<&decode>(library, "decode_attention");
}

}  // namespace almostgpt::binding
