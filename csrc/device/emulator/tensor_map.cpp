#include "device/emulator/tensor_map.h"

#include <algorithm>

#include "device/emulator/report.h"

namespace almostgpt::emulator {
namespace {

[[noreturn]] void refuse(const std::string& rule) { fail("tensor-map", {}, rule); }

}  // namespace

// Source: CUDA driver API, cuTensorMapEncodeTiled.
void make_tensor_map(TensorMap* map, const void* base, int element_bytes, bool is_float, int rank,
                     const uint64_t* dims, const uint64_t* strides, const uint32_t* box, device::SwizzleSpan span) {
  if (rank < 2 || rank > 5) refuse(format("rank %d; must be 2 to 5", rank));
  if (base == nullptr || reinterpret_cast<uintptr_t>(base) % 16)
    refuse("the base must be a multiple of 16 bytes, and not null");
  *map = TensorMap{};
  map->base = static_cast<unsigned char*>(const_cast<void*>(base));
  map->rank = static_cast<uint8_t>(rank);
  map->element_bytes = static_cast<uint8_t>(element_bytes);
  map->is_float = is_float;
  map->span = span;
  map->strides[0] = static_cast<uint64_t>(element_bytes);
  uint64_t box_bytes = element_bytes;
  for (int i = 0; i < rank; ++i) {
    if (dims[i] == 0 || dims[i] > uint64_t{1} << 32)
      refuse(format("dimension %d has %llu elements; must be 1 to 2^32", i, static_cast<unsigned long long>(dims[i])));
    if (box[i] == 0 || box[i] > 256)
      refuse(format("the box has %u elements in dimension %d; must be 1 to 256", box[i], i));
    if (i > 0 && (strides[i - 1] % 16 || strides[i - 1] >= uint64_t{1} << 40))
      refuse(format("dimension %d has a stride of %llu bytes; must be a multiple of 16 below 2^40", i,
                    static_cast<unsigned long long>(strides[i - 1])));
    map->dims[i] = dims[i];
    map->box[i] = static_cast<uint16_t>(box[i]);
    if (i > 0) map->strides[i] = strides[i - 1];
    box_bytes *= box[i];
  }
  const uint32_t inner = box[0] * element_bytes;
  const auto span_bytes = static_cast<uint32_t>(span);
  if (inner % 16) refuse(format("the box is %u bytes wide; must be a multiple of 16", inner));
  if (span_bytes && inner > span_bytes)
    refuse(format("the box is %u bytes wide; must not exceed the swizzle's span of %u", inner, span_bytes));
  // How a narrower box is laid out is not documented.
  if (span_bytes && inner != span_bytes)
    refuse(format("the box is %u bytes wide; the emulator wants exactly the swizzle's span of %u", inner, span_bytes));
  if (box_bytes > 227 * 1024) refuse("the box is larger than shared memory");
  map->magic = TensorMap::kMagic;
}

}  // namespace almostgpt::emulator
