// What stands in for CUtensorMap: the tensor as it was described, with its checks done.
#pragma once

#include "device/emulator/host_device.h"
#include "device/types.h"

namespace almostgpt::emulator {

struct TensorMap {
  static constexpr uint32_t kMagic = 0x7e4504a9;

  unsigned char* base;
  uint64_t dims[5];
  uint64_t strides[5];  // bytes; strides[0] is the size of an element
  uint16_t box[5];
  uint8_t rank;
  uint8_t element_bytes;
  bool is_float;
  device::SwizzleSpan span;
  uint32_t magic;

  uint32_t box_bytes() const {
    uint32_t bytes = element_bytes;
    for (int i = 0; i < rank; ++i) bytes *= box[i];
    return bytes;
  }
};

// Throws Error("tensor-map") naming the rule that the tensor breaks.
void make_tensor_map(TensorMap* map, const void* base, int element_bytes, bool is_float, int rank,
                     const uint64_t* dims, const uint64_t* strides, const uint32_t* box,
                     device::SwizzleSpan span);

}  // namespace almostgpt::emulator
