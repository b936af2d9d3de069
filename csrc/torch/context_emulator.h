// Context (context.h) on the emulator: a session, to which every tensor's memory is announced.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "device/emulator/emulator.h"

#define ALMOSTGPT_OPS(library) STABLE_TORCH_LIBRARY_IMPL(almostgpt_emulator, CPU, library)

namespace almostgpt::binding {

class Context {
 public:
  // capability: 10 * major + minor of the card that is played
  Context(const char* op, int64_t capability)
      : op(op), session_(static_cast<int>(capability / 10), static_cast<int>(capability % 10)) {}

  template <class T = void> const T* input(const char* name, const Tensor& tensor) {
    announce(name, tensor, tensor.const_data_ptr(), emulator::Use::input);
    return static_cast<const T*>(tensor.const_data_ptr());
  }
  template <class T = void> T* output(const char* name, const Tensor& tensor) {
    announce(name, tensor, tensor.mutable_data_ptr(), emulator::Use::output);
    return static_cast<T*>(tensor.mutable_data_ptr());
  }

  template <class T = void> T* state(const char* name, const Tensor& tensor) {
    announce(name, tensor, tensor.mutable_data_ptr(), emulator::Use::input_output);
    return static_cast<T*>(tensor.mutable_data_ptr());
  }

  void* stream() const { return nullptr; }
  void check(int error) const { check_error(op, error); }

  const char* const op;

 private:
  // From the first to the last byte of the view, whatever lies between.
  void announce(const char* name, const Tensor& tensor, const void* address, emulator::Use use) {
    STD_TORCH_CHECK(tensor.is_cpu(), op, ": ", name, " must be on the CPU, where the emulator runs");
    if (tensor.numel() == 0) return;
    int64_t elements = 1;
    for (int64_t d = 0; d < tensor.dim(); ++d) elements += (tensor.size(d) - 1) * tensor.stride(d);
    session_.buffer(name, address, static_cast<size_t>(elements) * tensor.element_size(), use);
  }

  emulator::Session session_;
};

// The op's own signature around f, and the card last. A finding of the emulator leaves as the
// std::runtime_error that torch knows; kernels/emulator.py reads its kind from the first line.
template <auto f> struct Call;
template <class R, class... A, R (*f)(Context&, A...)>
struct Call<f> {
  static inline const char* op = "";
  static R call(A... arguments, int64_t capability) {
    try {
      Context context(op, capability);
      return f(context, arguments...);
    } catch (const emulator::Error& error) {
      throw std::runtime_error("EmulatorError " + error.kind + "\n" + error.what());
    }
  }
};

}  // namespace almostgpt::binding
