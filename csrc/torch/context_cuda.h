// Context (context.h) on a GPU: the first argument's device, and torch's current stream on it.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <cstdint>

// Only a torch with CUDA has this symbol. Weak, it is null under one without, and the library
// loads all the same.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(
    int32_t device_index, void** ret_stream);

#define ALMOSTGPT_OPS(library) STABLE_TORCH_LIBRARY_IMPL(almostgpt, CUDA, library)

namespace almostgpt::binding {

class Context {
 public:
  Context(const char* op, const Tensor& first)
      : op(op), device_(device_of(op, first)), guard_(device_) {}

  template <class T = void> const T* input(const char* name, const Tensor& tensor) {
    check_device(name, tensor);
    return static_cast<const T*>(tensor.const_data_ptr());
  }
  template <class T = void> T* output(const char* name, const Tensor& tensor) {
    check_device(name, tensor);
    return static_cast<T*>(tensor.mutable_data_ptr());
  }

  // Read and written.
  template <class T = void> T* state(const char* name, const Tensor& tensor) { return output<T>(name, tensor); }

  void* stream() const {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "almostgpt: this torch has no CUDA");
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    return stream;
  }
  void check(int error) const { check_error(op, error); }

  const char* const op;

 private:
  static int32_t device_of(const char* op, const Tensor& first) {
    STD_TORCH_CHECK(first.is_cuda(), op, ": the first argument must be on a CUDA device");
    return first.get_device_index();
  }
  void check_device(const char* name, const Tensor& tensor) const {
    STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == device_, op, ": ", name,
                    " must be on the CUDA device of the first argument");
  }

  const int32_t device_;
  const torch::stable::accelerator::DeviceGuard guard_;
};

// The op's own signature around f.
template <auto f> struct Call;
template <class R, class First, class... Rest, R (*f)(Context&, First, Rest...)>
struct Call<f> {
  static inline const char* op = "";
  static R call(First first, Rest... rest) {
    Context context(op, first);
    return f(context, first, rest...);
  }
};

}  // namespace almostgpt::binding
