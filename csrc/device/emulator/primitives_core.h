// The primitives that every GPU has.
#pragma once

#include <cmath>
#include <cstring>
#include <tuple>

#define KERNEL __attribute__((unused)) void
#define DEVICE inline
#define LAUNCH_BOUNDS(threads, blocks)
#define GRID_CONSTANT
#define UNROLL
#define UNROLL_BY(n)

#include "device/emulator/emulator.h"
#include "device/emulator/host_device.h"
#include "device/emulator/numbers.h"
#include "device/emulator/runtime.h"
#include "device/types.h"

namespace almostgpt::device {

using emulator::Location;

// --- where am I ---------------------------------------------------------------------------------------------

DEVICE int thread_id() { return emulator::where.thread; }
DEVICE int lane_id() { return emulator::where.lane; }
DEVICE int warp_id() { return emulator::where.warp; }
DEVICE int block_size() { return emulator::where.block_size; }
DEVICE int block_x() { return static_cast<int>(emulator::where.block.x); }
DEVICE int block_y() { return static_cast<int>(emulator::where.block.y); }
DEVICE int block_z() { return static_cast<int>(emulator::where.block.z); }
DEVICE int grid_x() { return static_cast<int>(emulator::where.grid.x); }
DEVICE int grid_y() { return static_cast<int>(emulator::where.grid.y); }
DEVICE int grid_z() { return static_cast<int>(emulator::where.grid.z); }

// --- barriers -------------------------------------------------------------------------------------------------

DEVICE void cta_sync(Location at = Location::here()) { emulator::cta_sync(at); }
DEVICE void bar_sync(int barrier, int threads, Location at = Location::here()) {
  emulator::bar_sync(barrier, threads, at);
}
DEVICE void bar_arrive(int barrier, int threads, Location at = Location::here()) {
  emulator::bar_arrive(barrier, threads, at);
}
DEVICE void warp_sync(uint32_t mask = ~0u, Location at = Location::here()) { emulator::warp_sync(mask, at); }

// --- between the lanes of a warp --------------------------------------------------------------------------------

namespace detail {

template <class T> struct Shuffle {
  T value;
  int argument;
  T result;
};

// Every lane gets the value of the lane that source(lane, argument) names, or its own if there is none.
template <class T, int (*source)(int lane, int argument)>
T shuffle(const char* name, T value, int argument, uint32_t mask, Location at) {
  Shuffle<T> mine{value, argument, value};
  emulator::collective(name, &mine, mask, [](void** arguments, uint32_t lanes, Location where_called) {
    for (int lane = 0; lane < 32; ++lane) {
      if (!(lanes >> lane & 1)) continue;
      auto& own = *static_cast<Shuffle<T>*>(arguments[lane]);
      int from = source(lane, own.argument);
      if (from < 0 || from > 31) from = lane;
      if (!(lanes >> from & 1))
        emulator::fail("divergence", where_called,
                       emulator::format("lane %d reads lane %d, which is not in the mask 0x%08x", lane, from, lanes));
      own.result = static_cast<Shuffle<T>*>(arguments[from])->value;
    }
  }, at);
  return mine.result;
}

inline int lane_xor(int lane, int bits) { return lane ^ bits; }
inline int lane_down(int lane, int by) { return lane + by; }
inline int lane_up(int lane, int by) { return lane - by; }
inline int lane_at(int, int index) { return index & 31; }

}  // namespace detail

template <class T> T shfl_xor(T value, int bits, uint32_t mask = ~0u, Location at = Location::here()) {
  return detail::shuffle<T, detail::lane_xor>("shfl_xor", value, bits, mask, at);
}
template <class T> T shfl_down(T value, int by, uint32_t mask = ~0u, Location at = Location::here()) {
  return detail::shuffle<T, detail::lane_down>("shfl_down", value, by, mask, at);
}
template <class T> T shfl_up(T value, int by, uint32_t mask = ~0u, Location at = Location::here()) {
  return detail::shuffle<T, detail::lane_up>("shfl_up", value, by, mask, at);
}
template <class T> T shfl_idx(T value, int lane, uint32_t mask = ~0u, Location at = Location::here()) {
  return detail::shuffle<T, detail::lane_at>("shfl_idx", value, lane, mask, at);
}
DEVICE uint32_t ballot(bool predicate, uint32_t mask = ~0u, Location at = Location::here()) {
  struct Ballot {
    bool predicate;
    uint32_t result;
  } mine{predicate, 0};
  emulator::collective("ballot", &mine, mask, [](void** arguments, uint32_t lanes, Location) {
    uint32_t result = 0;
    for (int lane = 0; lane < 32; ++lane)
      if ((lanes >> lane & 1) && static_cast<Ballot*>(arguments[lane])->predicate) result |= 1u << lane;
    for (int lane = 0; lane < 32; ++lane)
      if (lanes >> lane & 1) static_cast<Ballot*>(arguments[lane])->result = result;
  }, at);
  return mine.result;
}

// --- shared memory ----------------------------------------------------------------------------------------------

namespace detail {
template <class V> constexpr bool is_accessible =
    std::is_trivially_copyable_v<V> &&
    (sizeof(V) == 1 || sizeof(V) == 2 || sizeof(V) == 4 || sizeof(V) == 8 || sizeof(V) == 16);
}

DEVICE shared_addr shared_base() { return emulator::kSharedBase; }

template <class V> V load_shared(shared_addr address, Location at = Location::here()) {
  static_assert(detail::is_accessible<V>);
  V value;
  emulator::load_shared(address, &value, sizeof(V), at);
  return value;
}
template <class V> void store_shared(shared_addr address, V value, Location at = Location::here()) {
  static_assert(detail::is_accessible<V>);
  emulator::store_shared(address, &value, sizeof(V), at);
}

// --- global memory ------------------------------------------------------------------------------------------------

template <class V, Cache cache = Cache::normal, class T>
V load_global_as(Global<T> from, Location at = Location::here()) {
  static_assert(detail::is_accessible<V>);
  V value;
  emulator::load_global(detail::address_of(from), &value, sizeof(V), cache != Cache::normal, at);
  return value;
}
template <Cache cache = Cache::normal, class T>
std::remove_const_t<T> load_global(Global<T> from, Location at = Location::here()) {
  return load_global_as<std::remove_const_t<T>, cache>(from, at);
}
template <class V, Cache cache = Cache::normal, class T>
void store_global_as(Global<T> to, V value, Location at = Location::here()) {
  static_assert(cache != Cache::read_only);
  static_assert(detail::is_accessible<V>);
  static_assert(!std::is_const_v<T>);
  emulator::store_global(detail::address_of(to), &value, sizeof(V), at);
}
template <Cache cache = Cache::normal, class T>
void store_global(Global<T> to, T value, Location at = Location::here()) {
  store_global_as<T, cache>(to, value, at);
}

// --- between blocks -------------------------------------------------------------------------------------------------

namespace detail {

template <class T> std::remove_const_t<T> load_strong(Global<T> from, bool acquire, Location at) {
  static_assert(sizeof(T) == 4);
  const uint32_t raw = emulator::load_strong(detail::address_of(from), acquire, at);
  std::remove_const_t<T> value;
  std::memcpy(&value, &raw, 4);
  return value;
}
template <class T> void store_strong(Global<T> to, T value, bool release, Location at) {
  static_assert(sizeof(T) == 4);
  uint32_t raw;
  std::memcpy(&raw, &value, 4);
  emulator::store_strong(detail::address_of(to), raw, release, at);
}

}  // namespace detail

DEVICE void fence_gpu(Location at = Location::here()) { emulator::fence_gpu(at); }

template <class T> std::remove_const_t<T> load_relaxed(Global<T> from, Location at = Location::here()) {
  return detail::load_strong(from, false, at);
}
template <class T> void store_relaxed(Global<T> to, T value, Location at = Location::here()) {
  detail::store_strong(to, value, false, at);
}
template <class T> std::remove_const_t<T> load_acquire(Global<T> from, Location at = Location::here()) {
  return detail::load_strong(from, true, at);
}
template <class T> void store_release(Global<T> to, T value, Location at = Location::here()) {
  detail::store_strong(to, value, true, at);
}

DEVICE float atomic_add(Global<float> to, float value, Location at = Location::here()) {
  return emulator::atomic_add(detail::address_of(to), value, at);
}
DEVICE uint32_t atomic_add(Global<uint32_t> to, uint32_t value, Location at = Location::here()) {
  return emulator::atomic_add(detail::address_of(to), value, false, at);
}
DEVICE uint32_t atomic_add_acq_rel(Global<uint32_t> to, uint32_t value, Location at = Location::here()) {
  return emulator::atomic_add(detail::address_of(to), value, true, at);
}
DEVICE void reduce_add(Global<float> to, float value, Location at = Location::here()) {
  emulator::atomic_add(detail::address_of(to), value, at);
}
DEVICE void reduce_add_f32x4(Global<float> to, f32x4 value, Location at = Location::here()) {
  emulator::check_alignment(detail::address_of(to), 16, "sum of four floats", at);
  emulator::atomic_add(detail::address_of(to), value.x, at);
  emulator::atomic_add(detail::address_of(to) + 1, value.y, at);
  emulator::atomic_add(detail::address_of(to) + 2, value.z, at);
  emulator::atomic_add(detail::address_of(to) + 3, value.w, at);
}

// --- maths: from libm, so not the last bits of the hardware -----------------------------------------------------------

DEVICE float exp2_approx(float x) { return emulator::flushed(std::exp2(emulator::flushed(x))); }
DEVICE float log2_approx(float x) { return emulator::flushed(std::log2(emulator::flushed(x))); }
DEVICE float rcp_approx(float x) { return emulator::flushed(emulator::reciprocal(emulator::flushed(x))); }
DEVICE float rsqrt_approx(float x) { return emulator::reciprocal(std::sqrt(emulator::flushed(x))); }
DEVICE float tanh_approx(float x) { return std::tanh(x); }
DEVICE float max(float a, float b) { return std::fmax(a, b); }
DEVICE float min(float a, float b) { return std::fmin(a, b); }
HOST_DEVICE constexpr int max(int a, int b) { return a > b ? a : b; }
HOST_DEVICE constexpr int min(int a, int b) { return a < b ? a : b; }

// --- 16-bit floats ------------------------------------------------------------------------------------------------------

DEVICE float to_float(float x) { return x; }
DEVICE float to_float(bf16 x) { return emulator::bf16_value(x.bits); }
DEVICE float to_float(fp16 x) { return emulator::fp16_value(x.bits); }
DEVICE bf16 to_bf16(float x) { return bf16{emulator::bf16_bits(x)}; }
DEVICE fp16 to_fp16(float x) { return fp16{emulator::fp16_bits(x)}; }

DEVICE uint32_t pack_bf16(float lo, float hi) {
  return emulator::bf16_bits(lo) | static_cast<uint32_t>(emulator::bf16_bits(hi)) << 16;
}
DEVICE float unpack_bf16_lo(uint32_t pair) { return emulator::bf16_value(static_cast<uint16_t>(pair)); }
DEVICE float unpack_bf16_hi(uint32_t pair) { return emulator::bf16_value(static_cast<uint16_t>(pair >> 16)); }
DEVICE uint32_t pack_fp16(float lo, float hi) {
  return emulator::fp16_bits(lo) | static_cast<uint32_t>(emulator::fp16_bits(hi)) << 16;
}
DEVICE float unpack_fp16_lo(uint32_t pair) { return emulator::fp16_value(static_cast<uint16_t>(pair)); }
DEVICE float unpack_fp16_hi(uint32_t pair) { return emulator::fp16_value(static_cast<uint16_t>(pair >> 16)); }

template <class T, int i, int j> uint32_t pair_of_int8(uint32_t bytes) {
  static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, fp16>);
  const float lo = static_cast<int8_t>(bytes >> 8 * i), hi = static_cast<int8_t>(bytes >> 8 * j);
  return std::is_same_v<T, bf16> ? pack_bf16(lo, hi) : pack_fp16(lo, hi);
}

// --- host -----------------------------------------------------------------------------------------------------------------

// The emulator returns no errors, it throws emulator::Error.
inline const char* error_string(int error) { return error == 0 ? "no error" : "unknown error"; }

inline int current_card(Card& card) {
  card = emulator::session_card();
  return 0;
}

namespace detail {
template <auto kernel> struct Launch;
template <class... Parameters, void (*kernel)(Parameters...)>
struct Launch<kernel> {
  static int go(const char* described, const LaunchShape& shape, Parameters... parameters) {
    const std::tuple<Parameters...> values(parameters...);
    return emulator::run_kernel(described, shape, [&values] { std::apply(kernel, values); });
  }
};
}  // namespace detail

// Runs the kernel to its end, and throws emulator::Error for what the checks find.
template <auto kernel, class... Arguments>
int launch(const LaunchShape& shape, void* stream, const Arguments&... arguments) {
  (void)stream;
  return detail::Launch<kernel>::go(__PRETTY_FUNCTION__, shape, arguments...);
}

}  // namespace almostgpt::device
