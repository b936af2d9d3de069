// The ops rms_norm_forward, add_rms_norm_forward and rms_norm_backward, on CUDA and on the emulator.
// Their schemas, fakes, autograd formulas and CPU versions are in kernels/rms_norm.py.

#include "norm/rms_norm.h"

#include <limits>
#include <optional>
#include <tuple>

#include "torch/context.h"
#include "torch/tensors.h"

namespace almostgpt::binding {
namespace {

using torch::stable::contiguous;
using torch::stable::new_empty;

RmsNormShape shape_of(const char* op, const Tensor& x, const Tensor& weight) {
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) >= 1, op, ": x must be (..., n) with n >= 1");
  const int64_t columns = x.size(x.dim() - 1);
  STD_TORCH_CHECK(weight.dim() == 1 && weight.size(0) == columns, op, ": weight must be (", columns,
                  ",), the last size of x");
  const RmsNormShape shape{x.numel() / columns, columns, dtype_of(op, "x", x),
                           dtype_of(op, "weight", weight)};
  // The kernels count both in 32 bits, and a step beyond the end.
  constexpr int64_t most = std::numeric_limits<int>::max() - (1 << 20);
  STD_TORCH_CHECK(shape.rows <= most && shape.columns <= most, op, ": more than ", most, " rows or columns");
  STD_TORCH_CHECK(shape.weight_dtype == shape.dtype || shape.weight_dtype == DType::float32, op,
                  ": weight must have the dtype of x, or float32");
  return shape;
}

void check_like(const char* op, const char* name, const Tensor& tensor, const Tensor& x) {
  STD_TORCH_CHECK(same_sizes(tensor, x) && tensor.scalar_type() == x.scalar_type(), op, ": ", name,
                  " must have the shape and dtype of x");
}

ConstRows input(Context& context, const char* name, const Rows& rows) {
  return {context.input(name, rows.tensor), rows.stride};
}

// One float32 a row: the shape of x without its last size.
Tensor new_rstd(const Tensor& x) {
  return new_empty(x, {x.sizes().data(), x.sizes().size() - 1}, ScalarType::Float);
}

// x (..., n), weight (n,), any strides -> y as x, contiguous; rstd (...), float32
std::tuple<Tensor, Tensor> forward(Context& context, const Tensor& x, const Tensor& weight, double eps) {
  const RmsNormShape shape = shape_of(context.op, x, weight);
  const Rows x_rows = rows_of(x);
  const Tensor dense_weight = contiguous(weight);
  Tensor y = new_empty(x, x.sizes());
  Tensor rstd = new_rstd(x);
  context.check(rms_norm_forward(shape, input(context, "x", x_rows), ConstRows{},
                                 context.input("weight", dense_weight), static_cast<float>(eps),
                                 context.output("y", y), nullptr, context.output<float>("rstd", rstd),
                                 context.stream()));
  return {y, rstd};
}

// residual as x -> y and sum = x + residual as x, contiguous; rstd (...), float32
std::tuple<Tensor, Tensor, Tensor> add_forward(Context& context, const Tensor& x, const Tensor& residual,
                                               const Tensor& weight, double eps) {
  const RmsNormShape shape = shape_of(context.op, x, weight);
  check_like(context.op, "residual", residual, x);
  const Rows x_rows = rows_of(x);
  const Rows residual_rows = rows_of(residual);
  const Tensor dense_weight = contiguous(weight);
  Tensor y = new_empty(x, x.sizes());
  Tensor sum = new_empty(x, x.sizes());
  Tensor rstd = new_rstd(x);
  context.check(rms_norm_forward(shape, input(context, "x", x_rows),
                                 input(context, "residual", residual_rows),
                                 context.input("weight", dense_weight), static_cast<float>(eps),
                                 context.output("y", y), context.output("sum", sum),
                                 context.output<float>("rstd", rstd), context.stream()));
  return {y, sum, rstd};
}

// dy and dsum (or none) as x, rstd as from forward -> dx as x, contiguous; dweight as weight
std::tuple<Tensor, Tensor> backward(Context& context, const Tensor& dy, const std::optional<Tensor>& dsum,
                                    const Tensor& x, const Tensor& weight, const Tensor& rstd) {
  const RmsNormShape shape = shape_of(context.op, x, weight);
  check_like(context.op, "dy", dy, x);
  if (dsum) check_like(context.op, "dsum", *dsum, x);
  STD_TORCH_CHECK(rstd.numel() == shape.rows && rstd.scalar_type() == ScalarType::Float, context.op,
                  ": rstd must be float32, one for each of ", shape.rows, " rows");
  const Rows x_rows = rows_of(x);
  const Rows dy_rows = rows_of(dy);
  const Rows dsum_rows = dsum ? rows_of(*dsum) : x_rows;  // without one it is not looked at
  const Tensor dense_weight = contiguous(weight);
  const Tensor dense_rstd = contiguous(rstd);
  int64_t partial_rows = 0;
  context.check(rms_norm_partial_rows(shape, &partial_rows));
  Tensor dx = new_empty(x, x.sizes());
  Tensor dweight = new_empty(weight, weight.sizes());
  Tensor partial = new_empty(x, {partial_rows, shape.columns}, ScalarType::Float);
  context.check(rms_norm_backward(
      shape, input(context, "dy", dy_rows),
      dsum ? input(context, "dsum", dsum_rows) : ConstRows{}, input(context, "x", x_rows),
      context.input("weight", dense_weight), context.input<float>("rstd", dense_rstd),
      context.output("dx", dx), context.output("dweight", dweight),
      context.output<float>("partial", partial), context.stream()));
  return {dx, dweight};
}

}  // namespace

ALMOSTGPT_OPS(library) {
  implement<&forward>(library, "rms_norm_forward");
  implement<&add_forward>(library, "add_rms_norm_forward");
  implement<&backward>(library, "rms_norm_backward");
}

}  // namespace almostgpt::binding
