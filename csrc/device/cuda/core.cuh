// The primitives that every GPU has (device.cuh lists them all).
#pragma once

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#error "the kernels are for sm_80 and later: give nvcc an architecture, such as -arch=sm_80"
#endif

#include <cuda_runtime.h>

#include <atomic>

#define KERNEL __global__ void
#define DEVICE __device__ __forceinline__
#define HOST_DEVICE __host__ __device__ __forceinline__
#define LAUNCH_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
#define GRID_CONSTANT __grid_constant__
#define ALMOSTGPT_PRAGMA(text) _Pragma(#text)
#define UNROLL ALMOSTGPT_PRAGMA(unroll)
#define UNROLL_BY(n) ALMOSTGPT_PRAGMA(unroll n)

#include "device/types.h"

namespace almostgpt::device {

// --- where am I: blocks are one-dimensional -----------------------------------------------------------

DEVICE int thread_id() { return threadIdx.x; }
DEVICE int lane_id() { return threadIdx.x & 31; }
DEVICE int warp_id() { return threadIdx.x >> 5; }
DEVICE int block_size() { return blockDim.x; }
DEVICE int block_x() { return blockIdx.x; }
DEVICE int block_y() { return blockIdx.y; }
DEVICE int block_z() { return blockIdx.z; }
DEVICE int grid_x() { return gridDim.x; }
DEVICE int grid_y() { return gridDim.y; }
DEVICE int grid_z() { return gridDim.z; }

// --- barriers -------------------------------------------------------------------------------------------

// Every thread of the block waits for all the others, and sees what they wrote before.
DEVICE void cta_sync() { __syncthreads(); }
// The same for `threads` threads, a multiple of 32, at barrier 1 to 15 (cta_sync is 0).
DEVICE void bar_sync(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
// Counts as arrived there, and does not wait.
DEVICE void bar_arrive(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
// The lanes in `mask` wait for each other, and see what they wrote before.
DEVICE void warp_sync(uint32_t mask = ~0u) { __syncwarp(mask); }

// --- between the lanes of a warp: registers move, memory is not ordered ---------------------------------

template <class T> DEVICE T shfl_xor(T value, int bits, uint32_t mask = ~0u) {
  return __shfl_xor_sync(mask, value, bits);
}
template <class T> DEVICE T shfl_down(T value, int by, uint32_t mask = ~0u) {
  return __shfl_down_sync(mask, value, by);
}
template <class T> DEVICE T shfl_up(T value, int by, uint32_t mask = ~0u) {
  return __shfl_up_sync(mask, value, by);
}
template <class T> DEVICE T shfl_idx(T value, int lane, uint32_t mask = ~0u) {
  return __shfl_sync(mask, value, lane);
}
// Bit l is lane l's predicate.
DEVICE uint32_t ballot(bool predicate, uint32_t mask = ~0u) { return __ballot_sync(mask, predicate); }

// --- shared memory --------------------------------------------------------------------------------------

extern __shared__ __align__(1024) unsigned char dynamic_shared_memory[];

// Where the dynamic shared memory begins: a multiple of 1024.
DEVICE shared_addr shared_base() {
  return static_cast<uint32_t>(__cvta_generic_to_shared(dynamic_shared_memory));
}

// V has 1, 2, 4, 8 or 16 bytes; the address is a multiple of its size.
template <class V> DEVICE V load_shared(shared_addr address) {
  V value;
  if constexpr (sizeof(V) == 16) {
    u32x4 raw;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(raw.x), "=r"(raw.y), "=r"(raw.z), "=r"(raw.w) : "r"(address) : "memory");
    memcpy(&value, &raw, 16);
  } else if constexpr (sizeof(V) == 8) {
    u32x2 raw;
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(raw.x), "=r"(raw.y) : "r"(address) : "memory");
    memcpy(&value, &raw, 8);
  } else if constexpr (sizeof(V) == 4) {
    uint32_t raw;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(raw) : "r"(address) : "memory");
    memcpy(&value, &raw, 4);
  } else if constexpr (sizeof(V) == 2) {
    uint16_t raw;
    asm volatile("ld.shared.b16 %0, [%1];" : "=h"(raw) : "r"(address) : "memory");
    memcpy(&value, &raw, 2);
  } else {
    static_assert(sizeof(V) == 1);
    uint32_t raw;
    asm volatile("ld.shared.u8 %0, [%1];" : "=r"(raw) : "r"(address) : "memory");
    memcpy(&value, &raw, 1);
  }
  return value;
}

template <class V> DEVICE void store_shared(shared_addr address, V value) {
  if constexpr (sizeof(V) == 16) {
    u32x4 raw;
    memcpy(&raw, &value, 16);
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};"
                 ::"r"(address), "r"(raw.x), "r"(raw.y), "r"(raw.z), "r"(raw.w) : "memory");
  } else if constexpr (sizeof(V) == 8) {
    u32x2 raw;
    memcpy(&raw, &value, 8);
    asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(address), "r"(raw.x), "r"(raw.y) : "memory");
  } else if constexpr (sizeof(V) == 4) {
    uint32_t raw;
    memcpy(&raw, &value, 4);
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(raw) : "memory");
  } else if constexpr (sizeof(V) == 2) {
    uint16_t raw;
    memcpy(&raw, &value, 2);
    asm volatile("st.shared.b16 [%0], %1;" ::"r"(address), "h"(raw) : "memory");
  } else {
    static_assert(sizeof(V) == 1);
    uint32_t raw = 0;
    memcpy(&raw, &value, 1);
    asm volatile("st.shared.u8 [%0], %1;" ::"r"(address), "r"(raw) : "memory");
  }
}

// --- global memory --------------------------------------------------------------------------------------

namespace detail {
template <size_t bytes> struct Raw;  // what the hardware loads and stores at once
template <> struct Raw<1> { using type = unsigned char; };
template <> struct Raw<2> { using type = unsigned short; };
template <> struct Raw<4> { using type = unsigned int; };
template <> struct Raw<8> { using type = uint2; };
template <> struct Raw<16> { using type = uint4; };

// Not volatile, and no "memory": nobody writes what they read, so the compiler may move them.
DEVICE uint4 load_once(const uint4* p) {
  uint4 v;
  asm("ld.global.nc.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}
DEVICE uint2 load_once(const uint2* p) {
  uint2 v;
  asm("ld.global.nc.L1::no_allocate.v2.b32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
  return v;
}
DEVICE unsigned int load_once(const unsigned int* p) {
  unsigned int v;
  asm("ld.global.nc.L1::no_allocate.b32 %0, [%1];" : "=r"(v) : "l"(p));
  return v;
}
DEVICE unsigned short load_once(const unsigned short* p) {
  unsigned short v;
  asm("ld.global.nc.L1::no_allocate.b16 %0, [%1];" : "=h"(v) : "l"(p));
  return v;
}
DEVICE unsigned char load_once(const unsigned char* p) { return __ldg(p); }
}  // namespace detail

// V, of 1, 2, 4, 8 or 16 bytes, from an address that is a multiple of its size, whatever T is.
template <class V, Cache cache = Cache::normal, class T> DEVICE V load_global_as(Global<T> from) {
  using Raw = typename detail::Raw<sizeof(V)>::type;
  const Raw* address = reinterpret_cast<const Raw*>(detail::address_of(from));
  Raw raw;
  if constexpr (cache == Cache::normal) raw = *address;
  else if constexpr (cache == Cache::read_only) raw = __ldg(address);
  else raw = detail::load_once(address);
  V value;
  memcpy(&value, &raw, sizeof(V));
  return value;
}
template <Cache cache = Cache::normal, class T> DEVICE std::remove_const_t<T> load_global(Global<T> from) {
  return load_global_as<std::remove_const_t<T>, cache>(from);
}

template <class V, Cache cache = Cache::normal, class T> DEVICE void store_global_as(Global<T> to, V value) {
  static_assert(cache != Cache::read_only);
  using Raw = typename detail::Raw<sizeof(V)>::type;
  Raw raw;
  memcpy(&raw, &value, sizeof(V));
  if constexpr (cache != Cache::normal) {
    __stcs(reinterpret_cast<Raw*>(detail::address_of(to)), raw);
  } else if constexpr (sizeof(V) == 16) {
    // As one number: of a struct's assignment nvcc 13.0 makes four stores in some kernels.
    unsigned __int128 number;
    memcpy(&number, &value, 16);
    *reinterpret_cast<unsigned __int128*>(detail::address_of(to)) = number;
  } else {
    *reinterpret_cast<Raw*>(detail::address_of(to)) = raw;
  }
}
template <Cache cache = Cache::normal, class T> DEVICE void store_global(Global<T> to, T value) {
  store_global_as<T, cache>(to, value);
}

// --- between blocks: all at GPU scope; T is 4 bytes wide ------------------------------------------------

// What this thread wrote or saw before it comes before what it writes or sees after it, for a block
// that reads (relaxed or atomic) a word written after it, and then fences too.
DEVICE void fence_gpu() { __threadfence(); }

template <class T> DEVICE std::remove_const_t<T> load_relaxed(Global<T> from) {
  static_assert(sizeof(T) == 4);
  uint32_t raw;
  asm volatile("ld.relaxed.gpu.global.b32 %0, [%1];" : "=r"(raw) : "l"(detail::address_of(from)) : "memory");
  std::remove_const_t<T> value;
  memcpy(&value, &raw, 4);
  return value;
}
template <class T> DEVICE void store_relaxed(Global<T> to, T value) {
  static_assert(sizeof(T) == 4);
  uint32_t raw;
  memcpy(&raw, &value, 4);
  asm volatile("st.relaxed.gpu.global.b32 [%0], %1;" ::"l"(detail::address_of(to)), "r"(raw) : "memory");
}
template <class T> DEVICE std::remove_const_t<T> load_acquire(Global<T> from) {
  static_assert(sizeof(T) == 4);
  uint32_t raw;
  asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(raw) : "l"(detail::address_of(from)) : "memory");
  std::remove_const_t<T> value;
  memcpy(&value, &raw, 4);
  return value;
}
template <class T> DEVICE void store_release(Global<T> to, T value) {
  static_assert(sizeof(T) == 4);
  uint32_t raw;
  memcpy(&raw, &value, 4);
  asm volatile("st.release.gpu.global.b32 [%0], %1;" ::"l"(detail::address_of(to)), "r"(raw) : "memory");
}

// The old value. Relaxed: orders nothing but itself.
DEVICE float atomic_add(Global<float> to, float value) { return atomicAdd(detail::address_of(to), value); }
DEVICE uint32_t atomic_add(Global<uint32_t> to, uint32_t value) { return atomicAdd(detail::address_of(to), value); }
// The old value; acquires and releases, as a counter that hands data over has to.
DEVICE uint32_t atomic_add_acq_rel(Global<uint32_t> to, uint32_t value) {
  uint32_t old;
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;"
               : "=r"(old) : "l"(detail::address_of(to)), "r"(value) : "memory");
  return old;
}
// The same sum where the old value is not needed.
DEVICE void reduce_add(Global<float> to, float value) {
  asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(detail::address_of(to)), "f"(value) : "memory");
}
// Four sums; the address is a multiple of 16. One instruction from sm_90 on (PTX ISA 8.1), four before.
DEVICE void reduce_add_f32x4(Global<float> to, f32x4 value) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};"
               ::"l"(detail::address_of(to)), "f"(value.x), "f"(value.y), "f"(value.z), "f"(value.w) : "memory");
#else
  reduce_add(to, value.x);
  reduce_add(to + 1, value.y);
  reduce_add(to + 2, value.z);
  reduce_add(to + 3, value.w);
#endif
}

// --- maths: the fast instructions, a few units in the last place off, subnormals are 0 -------------------

DEVICE float exp2_approx(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
DEVICE float log2_approx(float x) { float y; asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
DEVICE float rcp_approx(float x) { float y; asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
DEVICE float rsqrt_approx(float x) { float y; asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
// Relative error about 2^-11; subnormals are kept.
DEVICE float tanh_approx(float x) { float y; asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
// Of a number and NaN, the number.
DEVICE float max(float a, float b) { return fmaxf(a, b); }
DEVICE float min(float a, float b) { return fminf(a, b); }
HOST_DEVICE constexpr int max(int a, int b) { return a > b ? a : b; }
HOST_DEVICE constexpr int min(int a, int b) { return a < b ? a : b; }

// --- 16-bit floats: conversions round to the nearest, ties to even ---------------------------------------

DEVICE float to_float(float x) { return x; }
DEVICE float to_float(bf16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
DEVICE float to_float(fp16 x) { float y; asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits)); return y; }
DEVICE bf16 to_bf16(float x) { bf16 y; asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x)); return y; }
DEVICE fp16 to_fp16(float x) { fp16 y; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x)); return y; }

// Two in a register, `lo` in the lower half, which is the lower address.
DEVICE uint32_t pack_bf16(float lo, float hi) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(hi), "f"(lo));
  return pair;
}
DEVICE float unpack_bf16_lo(uint32_t pair) { return __uint_as_float(pair << 16); }
DEVICE float unpack_bf16_hi(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }
DEVICE uint32_t pack_fp16(float lo, float hi) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(hi), "f"(lo));
  return pair;
}
DEVICE float unpack_fp16_lo(uint32_t pair) { return to_float(fp16{static_cast<uint16_t>(pair)}); }
DEVICE float unpack_fp16_hi(uint32_t pair) { return to_float(fp16{static_cast<uint16_t>(pair >> 16)}); }

// Bytes i and j of four int8, exactly, as a pair of T. A byte takes the place of the lowest bits of a
// number whose last bit is 1, which is subtracted again: conversions have units of their own, and fewer.
template <class T, int i, int j> DEVICE uint32_t pair_of_int8(uint32_t bytes) {
  uint32_t pair;
  if constexpr (std::is_same_v<T, fp16>) {
    // 1024 + (x + 128), and minus 1152.
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(pair) : "r"(bytes ^ 0x80808080u), "r"(0x64646464u), "n"(0x4040 | j << 8 | i));
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(pair) : "r"(pair), "r"(0x64806480u));
  } else {
    static_assert(std::is_same_v<T, bf16>);
    // It has a bit less: 128 + (x without its sign), and minus 128, or 256 of a negative one.
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(pair) : "r"(bytes), "r"(0u), "n"(0x4040 | j << 8 | i));
    uint32_t low, base;  // (pair & mask) | bits is one instruction, of which nvcc 13.0 makes two
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(low) : "r"(pair), "r"(0x007f007fu), "r"(0x43004300u));
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(base) : "r"(pair), "r"(0x00800080u), "r"(0xc300c300u));
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(pair) : "r"(low), "r"(0x3f803f80u), "r"(base));
  }
  return pair;
}

// --- host -------------------------------------------------------------------------------------------------

// Errors are cudaError_t values; 0 is success.
inline const char* error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

// Of the current device.
inline int current_card(Card& card) {
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  const struct { int* value; cudaDeviceAttr attribute; } wanted[] = {
      {&card.major, cudaDevAttrComputeCapabilityMajor},
      {&card.minor, cudaDevAttrComputeCapabilityMinor},
      {&card.multiprocessors, cudaDevAttrMultiProcessorCount},
      {&card.shared_bytes_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin},
  };
  for (const auto& [value, attribute] : wanted)
    if (const cudaError_t error = cudaDeviceGetAttribute(value, attribute, device)) return error;
  return cudaSuccess;
}

namespace detail {
template <auto kernel> struct Launch;
template <class... Parameters, void (*kernel)(Parameters...)>
struct Launch<kernel> {
  static int go(const LaunchShape& shape, void* stream, Parameters... parameters) {
    if (shape.shared_bytes > 48 * 1024) {  // more than every card gives must be asked for
      if (const int error = allow_all_shared_memory()) return error;
    }
    cudaLaunchAttribute cooperative = {};
    cooperative.id = cudaLaunchAttributeCooperative;
    cooperative.val.cooperative = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(shape.grid.x, shape.grid.y, shape.grid.z);
    config.blockDim = dim3(shape.threads);
    config.dynamicSmemBytes = shape.shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &cooperative;
    config.numAttrs = shape.co_resident ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, parameters...);
  }

  // Once for each device: the most there is, so that no two threads set different limits.
  static int allow_all_shared_memory() {
    static std::atomic<uint64_t> allowed{0};  // a bit for each device
    int device = 0, most = 0;
    if (const cudaError_t error = cudaGetDevice(&device)) return error;
    const uint64_t bit = uint64_t{1} << (device & 63);
    if (allowed.load(std::memory_order_acquire) & bit) return cudaSuccess;
    if (const cudaError_t error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device))
      return error;
    if (const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most))
      return error;
    allowed.fetch_or(bit, std::memory_order_release);
    return cudaSuccess;
  }
};
}  // namespace detail

// Puts the kernel into the stream and does not wait for it. 0, or an error for error_string.
template <auto kernel, class... Arguments>
int launch(const LaunchShape& shape, void* stream, const Arguments&... arguments) {
  return detail::Launch<kernel>::go(shape, stream, arguments...);
}

}  // namespace almostgpt::device
