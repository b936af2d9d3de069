// How a binding reaches the machine: the same source is compiled into _C.so, where its launchers run on
// a GPU, and with ALMOSTGPT_EMULATOR into _emulator.so, where they run on the CPU emulator.
//
//   Tensor forward(Context& context, const Tensor& x, double eps) {
//     Tensor y = torch::stable::new_empty(x, x.sizes());
//     context.check(launch_it(context.input("x", x), eps, context.output("y", y), context.stream()));
//     return y;
//   }
//   ALMOSTGPT_OPS(library) { implement<&forward>(library, "op_name"); }
//
// A Context lives as long as one call, and offers the same on both sides:
//   context.op                    the op's name, which begins every message
//   context.input(name, tensor)   a pointer for the launcher, after a check that the tensor is on the
//   context.output(name, tensor)    device of the op's first argument; <float> for a float*
//   context.state(name, tensor)     … of what is read and written
//   context.stream()
//   context.check(error)          throws what a launcher returned
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "runtime.h"

namespace almostgpt::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_error(const char* op, int error) {
  STD_TORCH_CHECK(error == 0, op, ": ", error_string(error));
}

}  // namespace almostgpt::binding

#if defined(ALMOSTGPT_EMULATOR)
#include "torch/context_emulator.h"
#else
#include "torch/context_cuda.h"
#endif

namespace almostgpt::binding {

// Registers f(Context&, A...) as the op's implementation.
template <auto f>
void implement(torch::stable::detail::StableLibrary& library, const char* op) {
  Call<f>::op = op;
  library.impl(op, TORCH_BOX(&Call<f>::call));
}

}  // namespace almostgpt::binding
