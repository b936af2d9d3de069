// The ops cpu_kv_append and cpu_decode_attention, on a processor. Their schemas and fakes are in
// kernels/kv_cache_cpu.py.

#include <optional>
#include <tuple>

#include "cpu/kv_cache.h"
#include "torch/cpu.h"

namespace almostgpt::binding {
namespace {

using cpu::CacheSlots;
using torch::stable::new_empty;
using Optional = std::optional<Tensor>;

void check_values(const char* op, const char* name, const Tensor& tensor, int64_t size, ScalarType dtype) {
  STD_TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == size && tensor.scalar_type() == dtype && tensor.is_contiguous(),
                  op, ": ", name, " must be (", size, ",), contiguous, and of its dtype");
}

// nullptr of none.
template <class T>
const T* values(const char* op, const char* name, const Optional& tensor, int64_t size, ScalarType dtype) {
  if (!tensor) return nullptr;
  check_values(op, name, *tensor, size, dtype);
  return data<T>(*tensor);
}

CacheSlots slots_of(const char* op, const Tensor& q, Tensor& keys, Tensor& values, Optional& key_scales,
                    Optional& value_scales, const Tensor& lengths, int64_t sinks, int64_t reach) {
  STD_TORCH_CHECK(q.dim() == 4 && q.scalar_type() == ScalarType::Float, op, ": q must be (B, H, T, D) float32");
  const bool int8 = keys.scalar_type() == ScalarType::Char;
  STD_TORCH_CHECK(keys.dim() == 4 && same_sizes(keys, values) && keys.is_contiguous() && values.is_contiguous() &&
                      keys.size(0) == q.size(0) && keys.size(1) >= 1 && q.size(1) % keys.size(1) == 0 &&
                      keys.size(3) % 16 == 0 && keys.size(3) >= q.size(3),
                  op, ": keys and values must be contiguous (B, Hkv, C, D') that fit q");
  STD_TORCH_CHECK((int8 || keys.scalar_type() == ScalarType::Float) && keys.scalar_type() == values.scalar_type(), op,
                  ": keys and values must be float32 or int8");
  STD_TORCH_CHECK(int8 == key_scales.has_value() && int8 == value_scales.has_value(), op,
                  ": int8 slots, and no others, have scales");
  for (const Optional& scales : {key_scales, value_scales})
    STD_TORCH_CHECK(!scales || (scales->numel() == keys.numel() / keys.size(3) && scales->is_contiguous() &&
                                scales->scalar_type() == ScalarType::Float),
                    op, ": scales must be contiguous (B, Hkv, C) float32");
  STD_TORCH_CHECK(sinks >= 0 && sinks < reach && reach <= keys.size(2), op, ": 0 <= sinks < reach <= slots");
  check_values(op, "lengths", lengths, q.size(0), ScalarType::Int);
  return {keys.mutable_data_ptr(),
          values.mutable_data_ptr(),
          int8 ? mutable_data<float>(*key_scales) : nullptr,
          int8 ? mutable_data<float>(*value_scales) : nullptr,
          keys.size(1),
          keys.size(2),
          keys.size(3),
          sinks,
          reach};
}

cpu::Heads heads_of(const Tensor& x) { return {data<float>(x), x.stride(0), x.stride(1), x.stride(2)}; }

// As it is where the elements of D lie next to each other.
Tensor in_rows(const Tensor& x) { return x.stride(3) == 1 || x.size(3) == 1 ? x : torch::stable::contiguous(x); }

// q (B, H, T, D), k and v (B, Hkv, T, D) float32, any strides -> q turned, and where two are wanted q turned for
// the sinks, both contiguous; an empty tensor of what nobody needs. Writes into the slots.
std::tuple<Tensor, Tensor> kv_append(const Tensor& q, const Tensor& k, const Tensor& v, Tensor keys, Tensor values_,
                                     Optional key_scales, Optional value_scales, const Tensor& lengths,
                                     const Optional& new_lengths, const Optional& turns, int64_t sinks, int64_t reach,
                                     bool two, int64_t instruction_set) {
  constexpr const char* op = "cpu_kv_append";
  const int64_t B = q.size(0), H = q.size(1), T = q.size(2), D = q.size(3);
  const CacheSlots slots = slots_of(op, q, keys, values_, key_scales, value_scales, lengths, sinks, reach);
  STD_TORCH_CHECK(same_sizes(k, v) && k.dim() == 4 && k.size(0) == B && k.size(1) == slots.kv_heads && k.size(2) == T &&
                      k.size(3) == D && k.scalar_type() == ScalarType::Float && v.scalar_type() == ScalarType::Float,
                  op, ": k and v must be (B, Hkv, T, D) float32");
  STD_TORCH_CHECK(T <= slots.capacity - sinks, op, ": more tokens than slots");
  const int64_t half = turns ? turns->numel() : 0;
  STD_TORCH_CHECK(2 * half <= D, op, ": turns must be (R/2,) with R at most D");
  const Tensor q_rows = in_rows(q), k_rows = in_rows(k), v_rows = in_rows(v);
  Tensor q_out = turns ? new_empty(q, {B, H, T, D}) : new_empty(q, {0});
  Tensor q_sink = turns && two ? new_empty(q, {B, H, T, D}) : new_empty(q, {0});
  cpu::Append append{slots, heads_of(q_rows), heads_of(k_rows), heads_of(v_rows), H, T, D};
  append.lengths = data<int32_t>(lengths);
  append.new_lengths = values<int32_t>(op, "new_lengths", new_lengths, B, ScalarType::Int);
  append.turns = values<int64_t>(op, "turns", turns, half, ScalarType::Long);
  append.rotated = 2 * half;
  append.q_out = turns ? mutable_data<float>(q_out) : nullptr;
  append.q_sink = turns && two ? mutable_data<float>(q_sink) : nullptr;
  const cpu::AttentionKernels& kernels = cpu::attention_kernels(instruction_set_of(op, instruction_set));
  constexpr int64_t tokens_of_a_thread = 8;
  torch::stable::parallel_for(0, B * T, tokens_of_a_thread, [&](int64_t begin, int64_t end) {
    cpu::append_tokens(kernels, append, begin, end);
  });
  return {q_out, q_sink};
}

// q and q_sink (B, H, T, D') float32, D' being that of the slots -> as q, but (B, T, H, D') in memory.
Tensor decode_attention(const Tensor& q, const Optional& q_sink, Tensor keys, Tensor values_, Optional key_scales,
                        Optional value_scales, const Tensor& lengths, const Optional& new_lengths,
                        const Optional& alibi_slopes, const Optional& sink_logits, int64_t reach, int64_t sinks,
                        double scale, double softcap, int64_t instruction_set) {
  constexpr const char* op = "cpu_decode_attention";
  const int64_t B = q.size(0), H = q.size(1), T = q.size(2), width = q.size(3);
  const CacheSlots slots = slots_of(op, q, keys, values_, key_scales, value_scales, lengths, sinks, reach);
  STD_TORCH_CHECK(width == slots.width, op, ": q must be as wide as the slots");
  STD_TORCH_CHECK(!q_sink || (same_sizes(*q_sink, q) && q_sink->scalar_type() == ScalarType::Float), op,
                  ": q_sink must be like q");
  const Tensor dense_q = torch::stable::contiguous(q);
  const Tensor dense_sink = q_sink ? torch::stable::contiguous(*q_sink) : dense_q;
  Tensor out = new_empty(q, {B, T, H, width});
  cpu::Decode decode{slots, data<float>(dense_q), data<float>(dense_sink), H, T};
  decode.lengths = data<int32_t>(lengths);
  decode.new_lengths = values<int32_t>(op, "new_lengths", new_lengths, B, ScalarType::Int);
  decode.alibi_slopes = values<float>(op, "alibi_slopes", alibi_slopes, H, ScalarType::Float);
  decode.sink_logits = values<float>(op, "sink_logits", sink_logits, H, ScalarType::Float);
  decode.scale = static_cast<float>(scale);
  decode.softcap = static_cast<float>(softcap);
  decode.out = mutable_data<float>(out);
  const cpu::InstructionSet set = instruction_set_of(op, instruction_set);
  // A thread is woken for 128 KB of keys and values, which a core reads in about 10 microseconds.
  int64_t longest = 1;
  for (int64_t b = 0; b < B; ++b) longest = std::max<int64_t>(longest, decode.lengths[b] + T);
  const int64_t head_bytes = 2 * std::min(longest, slots.reach + T) * width * (keys.scalar_type() == ScalarType::Float ? 4 : 1);
  const int64_t heads_of_a_thread = std::max<int64_t>(1, (128 << 10) / std::max<int64_t>(1, head_bytes));
  torch::stable::parallel_for(0, B * slots.kv_heads, heads_of_a_thread, [&](int64_t begin, int64_t end) {
    cpu::decode_heads(cpu::dot_kernels(set), cpu::attention_kernels(set), decode, begin, end);
  });
  return torch::stable::transpose(out, 1, 2);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(almostgpt, CPU, library) {
  library.impl("cpu_kv_append", TORCH_BOX(&kv_append));
  library.impl("cpu_decode_attention", TORCH_BOX(&decode_attention));
}

}  // namespace almostgpt::binding
