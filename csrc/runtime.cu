#include "runtime.h"

#include <cuda_runtime.h>

namespace almostgpt {

const char* error_string(int cuda_error) {
  return cudaGetErrorString(static_cast<cudaError_t>(cuda_error));
}

}  // namespace almostgpt
