#include "runtime.h"

#include "device/device.cuh"

namespace almostgpt {

const char* error_string(int error) { return device::error_string(error); }

}  // namespace almostgpt
