// The op sample, on CUDA and on the emulator. Its schema, fake and CPU version are in kernels/sample.py.

#include "sampling/sample.h"

#include <optional>
#include <tuple>

#include "torch/context.h"
#include "torch/tensors.h"

namespace almostgpt::binding {
namespace {

using torch::stable::contiguous;
using torch::stable::new_empty;

// logits (B, V); positions, seeds, sequences (B,) int64; seen (B, V) bool or none, marked in place
// -> ids (B,) int64, and log-probabilities (B,) float32, or (0,) where nobody asks
std::tuple<Tensor, Tensor> draw(Context& context, const Tensor& logits_, const Tensor& positions_,
                                const Tensor& seeds_, const Tensor& sequences_, const std::optional<Tensor>& seen,
                                double temperature, int64_t top_k, double top_p, double min_p,
                                double repetition_penalty, bool logprobs) {
  STD_TORCH_CHECK(logits_.dim() == 2 && logits_.size(1) >= 1, context.op, ": logits must be (B, V) with V >= 1");
  const int64_t B = logits_.size(0), V = logits_.size(1);
  const DType dtype = dtype_of(context.op, "logits", logits_);
  // Top-k counts in float32, and rows are numbered in 31 bits.
  STD_TORCH_CHECK(V <= (1 << 24) && B < (int64_t{1} << 31), context.op, ": more than 2^24 logits or 2^31 rows");
  const auto checked = [&](const char* name, const Tensor& tensor) {
    STD_TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == B && tensor.scalar_type() == ScalarType::Long, context.op,
                    ": ", name, " must be int64, one for each row of logits");
    return contiguous(tensor);
  };
  const Tensor positions = checked("positions", positions_), seeds = checked("seeds", seeds_),
               sequences = checked("sequences", sequences_);
  STD_TORCH_CHECK(seen || repetition_penalty == 1.0, context.op, ": a repetition penalty needs seen");
  if (seen) {
    STD_TORCH_CHECK(same_sizes(*seen, logits_) && seen->scalar_type() == ScalarType::Bool &&
                        (V == 1 || seen->stride(1) == 1),
                    context.op, ": seen must be bool, of the shape of logits, in contiguous rows");
  }
  Tensor ids = new_empty(logits_, {B}, ScalarType::Long);
  Tensor found = new_empty(logits_, {logprobs ? B : 0}, ScalarType::Float);
  if (B == 0) return {ids, found};

  const Rows logits = rows_of(logits_);
  SampleInputs inputs{};
  inputs.rows = static_cast<int>(B), inputs.length = static_cast<int>(V), inputs.dtype = dtype;
  inputs.logits = context.input("logits", logits.tensor), inputs.stride = logits.stride;
  inputs.positions = context.input<int64_t>("positions", positions);
  inputs.seeds = context.input<int64_t>("seeds", seeds);
  inputs.sequences = context.input<int64_t>("sequences", sequences);
  const SampleOptions options{static_cast<float>(temperature),
                              static_cast<int>(top_k < V ? top_k : 0),
                              static_cast<float>(top_p), static_cast<float>(min_p),
                              static_cast<float>(repetition_penalty)};
  SampleOutputs outputs{};
  outputs.ids = context.output<int64_t>("ids", ids);
  if (logprobs) outputs.logprobs = context.output<float>("logprobs", found);
  if (seen) outputs.seen = context.state<uint8_t>("seen", *seen), outputs.seen_stride = seen->stride(0);
  context.check(sample(inputs, options, outputs, context.stream()));
  return {ids, found};
}

}  // namespace

ALMOSTGPT_OPS(library) { implement<&draw>(library, "sample"); }

}  // namespace almostgpt::binding
