// The op int8_linear, on CUDA and on the emulator. Its schema, fake and CPU version are in kernels/int8_linear.py.

#include "linear/int8_linear.h"

#include <limits>
#include <optional>
#include <vector>

#include "torch/context.h"
#include "torch/tensors.h"

namespace almostgpt::binding {
namespace {

using torch::stable::contiguous;
using torch::stable::new_empty;

bool aligned(const Tensor& tensor) { return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0; }

// Dense, from a multiple of 16 bytes: in place where it is so, as a weight always is that is a tensor of its own.
Tensor dense(const Tensor& tensor) {
  const Tensor result = contiguous(tensor);
  return aligned(result) ? result : torch::stable::clone(result);
}

// The same of rows, which may lie apart.
Rows aligned_rows(const Tensor& x) {
  const Rows rows = rows_of(x);
  if (aligned(rows.tensor) && rows.stride % 8 == 0) return rows;
  return rows_of(dense(x));
}

// x (..., K) of at most 16 rows, any strides; weight (N, K) int8; scales (N,) float32; bias (N,) -> (..., N)
Tensor linear(Context& context, const Tensor& x, const Tensor& weight_, const Tensor& scales_,
              const std::optional<Tensor>& bias_) {
  const char* op = context.op;
  STD_TORCH_CHECK(x.dim() >= 1 && weight_.dim() == 2 && x.size(x.dim() - 1) == weight_.size(1), op,
                  ": x must be (..., K) and weight (N, K)");
  const int64_t outputs = weight_.size(0), columns = weight_.size(1);
  STD_TORCH_CHECK(columns > 0 && columns % kInt8LinearColumns == 0 && columns < (1 << 30), op,
                  ": K must be a multiple of ", kInt8LinearColumns, " below 2^30");
  // The kernel counts blocks in 31 bits.
  STD_TORCH_CHECK(outputs < std::numeric_limits<int>::max(), op, ": more than 2^31 - 2 outputs");
  const int64_t rows = x.numel() / columns;
  STD_TORCH_CHECK(rows <= kInt8LinearRows, op, ": at most ", kInt8LinearRows, " rows of x");
  STD_TORCH_CHECK(weight_.scalar_type() == ScalarType::Char, op, ": weight must be int8");
  STD_TORCH_CHECK(scales_.dim() == 1 && scales_.size(0) == outputs && scales_.scalar_type() == ScalarType::Float, op,
                  ": scales must be float32, (", outputs, ",)");
  Int8LinearShape shape{static_cast<int>(rows), outputs, static_cast<int>(columns), dtype_of(op, "x", x), DType::float32};
  STD_TORCH_CHECK(shape.dtype != DType::float32, op, ": x must be bfloat16 or float16");
  std::optional<Tensor> bias;
  if (bias_) {
    bias = contiguous(*bias_);
    shape.bias_dtype = dtype_of(op, "bias", *bias);
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == outputs &&
                        (shape.bias_dtype == shape.dtype || shape.bias_dtype == DType::float32),
                    op, ": bias must be (", outputs, ",), of x's dtype or float32");
  }
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = outputs;
  Tensor y = new_empty(x, {sizes.data(), sizes.size()});
  if (y.numel() == 0) return y;
  const Rows x_rows = aligned_rows(x);
  const Tensor weight = dense(weight_), scales = contiguous(scales_);
  context.check(int8_linear(shape, context.input("x", x_rows.tensor), x_rows.stride,
                            context.input<int8_t>("weight", weight), context.input<float>("scales", scales),
                            bias ? context.input("bias", *bias) : nullptr, context.output("y", y), context.stream()));
  return y;
}

}  // namespace

ALMOSTGPT_OPS(library) { implement<&linear>(library, "int8_linear"); }

}  // namespace almostgpt::binding
