// The ops cpu_linear and cpu_int8_linear, on a processor. Their schemas and fakes are in kernels/linear.py and
// kernels/int8_linear.py.

#include <optional>
#include <vector>

#include "cpu/linear.h"
#include "torch/cpu.h"

namespace almostgpt::binding {
namespace {

using cpu::LinearShape;

// Rows of the weight that a thread must have at the least are those of so many blocks: 64 KB or more, which
// take a core about as long to read as two threads take to meet.
constexpr int64_t kBlocksOfAThread = 4;

void check(const char* op, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  STD_TORCH_CHECK(weight.dim() == 2 && weight.is_contiguous(), op, ": weight must be a contiguous matrix");
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) == weight.size(1), op, ": x must be (..., ", weight.size(1), ")");
  STD_TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == weight.size(0) && bias->is_contiguous()), op,
                  ": bias must be (", weight.size(0), ",) and contiguous");
}

Tensor new_output(const Tensor& x, int64_t outputs) {
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = outputs;
  return torch::stable::new_empty(x, sizes);
}

// part(begin, end) for all outputs, in whole blocks of the weight.
template <class Part> void for_outputs(const LinearShape& shape, int64_t weight_bytes, const Part& part) {
  const int64_t block = cpu::block_outputs(shape.inputs, weight_bytes);
  torch::stable::parallel_for(0, (shape.outputs + block - 1) / block, kBlocksOfAThread,
                              [&](int64_t begin, int64_t end) {
                                part(begin * block, std::min(shape.outputs, end * block));
                              });
}

template <class T>
void linear_as(const cpu::DotKernels& kernels, const LinearShape& shape, const Rows& x, const Tensor& weight,
               const std::optional<Tensor>& bias, Tensor& y) {
  const T* const rows = data<T>(x.tensor);
  std::vector<float> wide;  // x in float32
  const float* wide_rows = reinterpret_cast<const float*>(rows);
  int64_t stride = x.stride;
  if constexpr (!std::is_same_v<T, float>) {
    wide.resize(shape.rows * shape.inputs);
    for (int64_t r = 0; r < shape.rows; ++r)
      for (int64_t k = 0; k < shape.inputs; ++k) wide[r * shape.inputs + k] = cpu::to_float(rows[r * stride + k]);
    wide_rows = wide.data();
    stride = shape.inputs;
  }
  for_outputs(shape, sizeof(T), [&](int64_t begin, int64_t end) {
    cpu::linear_part<T>(kernels, shape, wide_rows, stride, data<T>(weight), bias ? data<T>(*bias) : nullptr,
                        mutable_data<T>(y), begin, end);
  });
}

// x (..., K), weight (N, K), bias (N,), all float32 or all bfloat16 -> (..., N)
Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t instruction_set) {
  constexpr const char* op = "cpu_linear";
  check(op, x, weight, bias);
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(weight.scalar_type() == dtype && (!bias || bias->scalar_type() == dtype), op,
                  ": x, weight and bias must have one dtype");
  const cpu::DotKernels& kernels = cpu::dot_kernels(instruction_set_of(op, instruction_set));
  const Rows rows = rows_of(x);
  const LinearShape shape{rows.rows, weight.size(1), weight.size(0)};
  Tensor y = new_output(x, shape.outputs);
  if (y.numel() == 0) return y;
  if (dtype == ScalarType::Float) linear_as<float>(kernels, shape, rows, weight, bias, y);
  else if (dtype == ScalarType::BFloat16) linear_as<cpu::bf16>(kernels, shape, rows, weight, bias, y);
  else STD_TORCH_CHECK(false, op, ": x must be float32 or bfloat16");
  return y;
}

template <class T>
void int8_linear_as(const cpu::DotKernels& kernels, const LinearShape& shape, const Rows& x, const Tensor& weight,
                    const Tensor& scales, const std::optional<Tensor>& bias, Tensor& y) {
  std::vector<int16_t> codes(shape.rows * shape.inputs);
  std::vector<double> x_scales(shape.rows);
  constexpr int64_t rows_of_a_thread = 16;
  torch::stable::parallel_for(0, shape.rows, rows_of_a_thread, [&](int64_t begin, int64_t end) {
    cpu::quantize_rows<T>(data<T>(x.tensor) + begin * x.stride, x.stride, end - begin, shape.inputs,
                          codes.data() + begin * shape.inputs, x_scales.data() + begin);
  });
  for_outputs(shape, sizeof(int8_t), [&](int64_t begin, int64_t end) {
    cpu::int8_linear_part<T>(kernels, shape, codes.data(), x_scales.data(), data<int8_t>(weight), data<float>(scales),
                             bias ? data<float>(*bias) : nullptr, mutable_data<T>(y), begin, end);
  });
}

// x (..., K) float32 or bfloat16, weight (N, K) int8, scales and bias (N,) float32 -> (..., N) in x's dtype
Tensor int8_linear(const Tensor& x, const Tensor& weight, const Tensor& scales, const std::optional<Tensor>& bias,
                   int64_t instruction_set) {
  constexpr const char* op = "cpu_int8_linear";
  check(op, x, weight, bias);
  STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Char, op, ": weight must be int8");
  STD_TORCH_CHECK(scales.scalar_type() == ScalarType::Float && scales.dim() == 1 && scales.is_contiguous() &&
                      scales.size(0) == weight.size(0),
                  op, ": scales must be float32, (", weight.size(0), ",) and contiguous");
  STD_TORCH_CHECK(!bias || bias->scalar_type() == ScalarType::Float, op, ": bias must be float32");
  const cpu::DotKernels& kernels = cpu::dot_kernels(instruction_set_of(op, instruction_set));
  const Rows rows = rows_of(x);
  const LinearShape shape{rows.rows, weight.size(1), weight.size(0)};
  Tensor y = new_output(x, shape.outputs);
  if (y.numel() == 0) return y;
  if (x.scalar_type() == ScalarType::Float) int8_linear_as<float>(kernels, shape, rows, weight, scales, bias, y);
  else if (x.scalar_type() == ScalarType::BFloat16)
    int8_linear_as<cpu::bf16>(kernels, shape, rows, weight, scales, bias, y);
  else STD_TORCH_CHECK(false, op, ": x must be float32 or bfloat16");
  return y;
}

// Names of the instruction sets that run here, the best last, with commas between them.
std::string instruction_sets() {
  std::string names;
  for (int i = 0; i < cpu::kInstructionSets; ++i) {
    const auto set = static_cast<cpu::InstructionSet>(i);
    if (cpu::available(set)) names += (names.empty() ? "" : ",") + std::string(cpu::name_of(set));
  }
  return names;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(almostgpt, library) { library.def("cpu_instruction_sets() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(almostgpt, CompositeExplicitAutograd, library) {
  library.impl("cpu_instruction_sets", TORCH_BOX(&instruction_sets));
}

STABLE_TORCH_LIBRARY_IMPL(almostgpt, CPU, library) {
  library.impl("cpu_linear", TORCH_BOX(&linear));
  library.impl("cpu_int8_linear", TORCH_BOX(&int8_linear));
}

}  // namespace almostgpt::binding
