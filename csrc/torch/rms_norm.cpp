// torch.ops.almostgpt.rms_norm_forward and rms_norm_backward on CUDA.
// Their schemas, fakes, autograd formulas and CPU versions are in kernels/rms_norm.py.

#include "norm/rms_norm.h"

#include <tuple>

#include "torch/tensors.h"

namespace almostgpt::binding {
namespace {

RmsNormShape shape_of(const char* op, const Tensor& x, const Tensor& weight, const Rows& rows) {
  const RmsNormShape shape{rows.rows, rows.columns, dtype_of(op, "x", x),
                           dtype_of(op, "weight", weight)};
  STD_TORCH_CHECK(shape.weight_dtype == shape.dtype || shape.weight_dtype == DType::float32, op,
                  ": weight must have the dtype of x, or float32");
  return shape;
}

void check_inputs(const char* op, const Tensor& x, const Tensor& weight) {
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) >= 1, op, ": x must be (..., n) with n >= 1");
  const int64_t columns = x.size(x.dim() - 1);
  STD_TORCH_CHECK(weight.dim() == 1 && weight.size(0) == columns, op, ": weight must be (", columns,
                  ",), the last size of x");
  check_same_device(op, "weight", weight, x);
}

// x (..., n), weight (n,), any strides -> y as x, contiguous; rstd (...), float32
std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& weight, double eps) {
  const char* op = "rms_norm_forward";
  check_inputs(op, x, weight);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Rows rows = rows_of(x);
  const RmsNormShape shape = shape_of(op, x, weight, rows);
  const Tensor dense_weight = torch::stable::contiguous(weight);
  Tensor y = torch::stable::new_empty(x, x.sizes());
  Tensor rstd =
      torch::stable::new_empty(x, {x.sizes().data(), x.sizes().size() - 1}, ScalarType::Float);
  check_launch(op, rms_norm_forward(shape, rows.tensor.const_data_ptr(), rows.stride,
                                    dense_weight.const_data_ptr(), static_cast<float>(eps),
                                    y.mutable_data_ptr(), rstd.mutable_data_ptr<float>(),
                                    current_stream(x)));
  return {y, rstd};
}

// dy as x, rstd as from forward -> dx as x, contiguous; dweight as weight
std::tuple<Tensor, Tensor> backward(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                    const Tensor& rstd) {
  const char* op = "rms_norm_backward";
  check_inputs(op, x, weight);
  STD_TORCH_CHECK(same_sizes(dy, x) && dy.scalar_type() == x.scalar_type(), op,
                  ": dy must have the shape and dtype of x");
  check_same_device(op, "dy", dy, x);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Rows x_rows = rows_of(x);
  const Rows dy_rows = rows_of(dy);
  const RmsNormShape shape = shape_of(op, x, weight, x_rows);
  STD_TORCH_CHECK(rstd.numel() == shape.rows && rstd.scalar_type() == ScalarType::Float, op,
                  ": rstd must be float32, one for each of ", shape.rows, " rows");
  check_same_device(op, "rstd", rstd, x);
  const Tensor dense_weight = torch::stable::contiguous(weight);
  const Tensor dense_rstd = torch::stable::contiguous(rstd);
  Tensor dx = torch::stable::new_empty(x, x.sizes());
  Tensor dweight = torch::stable::new_empty(weight, weight.sizes());
  Tensor partial = torch::stable::new_empty(
      x, {rms_norm_partial_rows(shape.rows), shape.columns}, ScalarType::Float);
  check_launch(op, rms_norm_backward(shape, dy_rows.tensor.const_data_ptr(), dy_rows.stride,
                                     x_rows.tensor.const_data_ptr(), x_rows.stride,
                                     dense_weight.const_data_ptr(),
                                     dense_rstd.const_data_ptr<float>(), dx.mutable_data_ptr(),
                                     dweight.mutable_data_ptr(), partial.mutable_data_ptr<float>(),
                                     current_stream(x)));
  return {dx, dweight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(almostgpt, CUDA, library) {
  library.impl("rms_norm_forward", TORCH_BOX(&forward));
  library.impl("rms_norm_backward", TORCH_BOX(&backward));
}

}  // namespace almostgpt::binding
