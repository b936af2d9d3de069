// What every family of kernels shares with its callers: element types and error texts.
// Plain C++: this header and those beside the kernels include neither torch nor CUDA.
#pragma once

namespace almostgpt {

enum class DType { float32, bfloat16, float16 };

// The text of an error that a launcher returned.
const char* error_string(int error);

}  // namespace almostgpt
