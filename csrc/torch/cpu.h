// What bindings of the kernels for a processor share: the instruction set of a call, and data of tensors.
#pragma once

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <string>
#include <type_traits>

#include "cpu/instruction_set.h"
#include "torch/tensors.h"

namespace almostgpt::binding {

// -1: the best that is available.
inline cpu::InstructionSet instruction_set_of(const char* op, int64_t number) {
  if (number == -1) return cpu::best_instruction_set();
  const auto set = static_cast<cpu::InstructionSet>(number);
  STD_TORCH_CHECK(number >= 0 && number < cpu::kInstructionSets && cpu::available(set), op,
                  ": no instruction set ", number, " in this library on this processor");
  return set;
}

template <class T> const T* data(const Tensor& tensor) { return static_cast<const T*>(tensor.const_data_ptr()); }
template <class T> T* mutable_data(Tensor& tensor) { return static_cast<T*>(tensor.mutable_data_ptr()); }

}  // namespace almostgpt::binding
