// The types that both sides of device.cuh share. Included by them, after they define HOST_DEVICE.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace almostgpt::device {

struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };
struct alignas(8) u32x2 { uint32_t x, y; };
struct alignas(16) u32x4 { uint32_t x, y, z, w; };
struct alignas(16) f32x4 { float x, y, z, w; };

// A byte address in the shared memory of the block, as ld.shared and the tensor cores take it.
using shared_addr = uint32_t;

// How an access to global memory treats the caches.
enum class Cache {
  normal,
  read_only,  // loads of what nobody writes while the kernel runs: ld.global.nc
  streaming,  // touched once: loads are read_only and leave nothing in L1; stores are evicted first
};

template <class T> class Global;
namespace detail {
// For the primitives, and for hosts.
template <class T> HOST_DEVICE T* address_of(Global<T> pointer) { return pointer.address_; }
}  // namespace detail

// A pointer into global memory, only to be handed to primitives: it cannot be dereferenced, so no
// access escapes their checks. Arithmetic counts elements, in 64 bits.
template <class T>
class Global {
 public:
  Global() = default;
  HOST_DEVICE explicit Global(T* address) : address_(address) {}
  // Global<T> becomes Global<const T> by itself.
  template <class U, class = std::enable_if_t<std::is_same_v<const U, T>>>
  HOST_DEVICE Global(Global<U> other) : address_(detail::address_of(other)) {}

  HOST_DEVICE Global operator+(int64_t elements) const { return Global(address_ + elements); }
  HOST_DEVICE Global operator-(int64_t elements) const { return Global(address_ - elements); }
  HOST_DEVICE explicit operator bool() const { return address_ != nullptr; }
  // The same address as elements of another type.
  template <class U>
  HOST_DEVICE Global<U> as() const { return Global<U>(reinterpret_cast<U*>(address_)); }

 private:
  template <class U> friend HOST_DEVICE U* detail::address_of(Global<U> pointer);

  T* address_ = nullptr;
};

// The swizzle of a tile in shared memory. Chunk c (16 bytes) of the 128-byte line l lies at chunk
// c ^ (l mod span/16) of it; a tile with rows of 128 bytes so has its row r's chunk c at c ^ (r mod 8).
// TMA writes it, wgmma and swizzled() read it.
// Source: PTX ISA, "Tensor Swizzling Modes".
enum class SwizzleSpan : int { none = 0, bytes32 = 32, bytes64 = 64, bytes128 = 128 };

// Where the byte at `address` of an unswizzled tile lies; tiles start at multiples of 8 spans.
HOST_DEVICE constexpr shared_addr swizzled(shared_addr address, SwizzleSpan span) {
  const uint32_t rows = span == SwizzleSpan::none ? 0 : static_cast<uint32_t>(span) / 16 - 1;
  return address ^ ((address >> 7 & rows) << 4);
}

// The operand of a wgmma in shared memory. Offsets are in bytes, multiples of 16.
// K-major: `stride` from one group of 8 rows to the next; `leading`, unswizzled only, from the
// first 8 elements of k to the next. MN-major, swizzled: `leading` from one span of the M or N
// dimension to the next, `stride` from 8 rows of k to the next; unswizzled the two change places.
// Source: PTX ISA, "Asynchronous Warpgroup Level Matrix Shared Memory Layout" and "Matrix Descriptor".
HOST_DEVICE constexpr uint64_t matrix_descriptor(shared_addr start, uint32_t leading, uint32_t stride,
                                                 SwizzleSpan span) {
  const uint64_t mode = span == SwizzleSpan::bytes128  ? 1
                        : span == SwizzleSpan::bytes64 ? 2
                        : span == SwizzleSpan::bytes32 ? 3
                                                       : 0;
  return static_cast<uint64_t>((start & 0x3ffff) >> 4) |
         static_cast<uint64_t>((leading & 0x3ffff) >> 4) << 16 |
         static_cast<uint64_t>((stride & 0x3ffff) >> 4) << 32 | mode << 62;
}

// The operand that begins `bytes` further, a multiple of 16: one addition of 32 bits, where a descriptor made
// anew takes several instructions. Shared memory has 228 KiB, so that the sum stays within its 14 bits.
HOST_DEVICE constexpr uint64_t advanced(uint64_t descriptor, uint32_t bytes) {
  return (descriptor & ~uint64_t{0xffffffff}) | (static_cast<uint32_t>(descriptor) + (bytes >> 4));
}

// --- host ------------------------------------------------------------------------------------------

struct Dim3 { unsigned x = 1, y = 1, z = 1; };

// One-dimensional blocks, dynamic shared memory only.
struct LaunchShape {
  Dim3 grid;
  int threads = 0;
  uint32_t shared_bytes = 0;
  // All blocks run at the same time, so that they may wait for each other; a grid that does not fit
  // on the card is refused.
  bool co_resident = false;
};

// What a launch plans with.
struct Card {
  int major = 0, minor = 0;  // compute capability
  int multiprocessors = 0;
  int shared_bytes_per_block = 0;  // the most that a launch may ask for
};

}  // namespace almostgpt::device
