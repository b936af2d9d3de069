// What Hopper adds (sm_90a): mbarriers, the tensor memory accelerator (TMA), warpgroup matrix products.
// Only files named *_sm90.cu, compiled for 90a alone, may call these.
#pragma once

#include <cuda.h>

#include "device/cuda/core.cuh"

namespace almostgpt::device {

using TensorMap = CUtensorMap;

// One lane of the warp, the same every time; all lanes call.
DEVICE bool elect_one() {
  uint32_t elected;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(elected));
  return elected;
}

// --- mbarriers: 8 bytes of shared memory that count arrivals and bytes in phases --------------------------

// A phase is complete after `arrivals` arrivals, when all expected bytes have come too.
DEVICE void mbar_init(shared_addr barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// One arrival; what this thread wrote before is seen by who waits for the phase.
DEVICE void mbar_arrive(shared_addr barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// One arrival, and `bytes` more to come by TMA in this phase.
DEVICE void mbar_arrive_expect_tx(shared_addr barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Whether the phase of this parity is complete; the first phase has parity 0, and before it is
// complete the one "before" it, of parity 1, counts as complete. May wait a little.
DEVICE bool mbar_try_wait(shared_addr barrier, uint32_t parity) {
  uint32_t complete;
  asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
               : "=r"(complete) : "r"(barrier), "r"(parity) : "memory");
  return complete;
}
DEVICE void mbar_wait(shared_addr barrier, uint32_t parity) {
  while (!mbar_try_wait(barrier, parity)) {}
}
// After mbar_init, before a barrier: makes the initialised mbarrier visible to TMA.
DEVICE void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// Orders this thread's own loads and stores of shared memory before what TMA and wgmma, which go
// another way (the async proxy), do after a barrier that follows.
DEVICE void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// --- TMA: one thread moves a whole box of a tensor ---------------------------------------------------------

DEVICE void prefetch_tensor_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// The box at these coordinates (innermost first, in elements; what lies outside the tensor is 0)
// into shared memory, 128-byte aligned and swizzled as the map says; it counts its bytes at `barrier`.
DEVICE void tma_load(shared_addr to, const TensorMap* map, shared_addr barrier, int c0, int c1) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];"
               ::"r"(to), "l"(map), "r"(barrier), "r"(c0), "r"(c1) : "memory");
}
DEVICE void tma_load(shared_addr to, const TensorMap* map, shared_addr barrier, int c0, int c1, int c2) {
  asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];"
               ::"r"(to), "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2) : "memory");
}
DEVICE void tma_load(shared_addr to, const TensorMap* map, shared_addr barrier, int c0, int c1, int c2, int c3) {
  asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];"
               ::"r"(to), "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3) : "memory");
}
DEVICE void tma_load(shared_addr to, const TensorMap* map, shared_addr barrier, int c0, int c1, int c2, int c3, int c4) {
  asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6, %7}], [%2];"
               ::"r"(to), "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4) : "memory");
}

// The box from shared memory; what lies outside the tensor is not written. Belongs to this thread's
// current bulk group, and reads shared memory until a tma_wait or tma_wait_read of this thread.
DEVICE void tma_store(const TensorMap* map, shared_addr from, int c0, int c1) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];"
               ::"l"(map), "r"(from), "r"(c0), "r"(c1) : "memory");
}
DEVICE void tma_store(const TensorMap* map, shared_addr from, int c0, int c1, int c2) {
  asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];"
               ::"l"(map), "r"(from), "r"(c0), "r"(c1), "r"(c2) : "memory");
}
DEVICE void tma_store(const TensorMap* map, shared_addr from, int c0, int c1, int c2, int c3) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];"
               ::"l"(map), "r"(from), "r"(c0), "r"(c1), "r"(c2), "r"(c3) : "memory");
}
DEVICE void tma_store(const TensorMap* map, shared_addr from, int c0, int c1, int c2, int c3, int c4) {
  asm volatile("cp.async.bulk.tensor.5d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];"
               ::"l"(map), "r"(from), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4) : "memory");
}

// The same, added to what is there (the map's type is float32), each element atomically.
DEVICE void tma_reduce_add(const TensorMap* map, shared_addr from, int c0, int c1) {
  asm volatile("cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.bulk_group [%0, {%2, %3}], [%1];"
               ::"l"(map), "r"(from), "r"(c0), "r"(c1) : "memory");
}
DEVICE void tma_reduce_add(const TensorMap* map, shared_addr from, int c0, int c1, int c2) {
  asm volatile("cp.reduce.async.bulk.tensor.3d.global.shared::cta.add.bulk_group [%0, {%2, %3, %4}], [%1];"
               ::"l"(map), "r"(from), "r"(c0), "r"(c1), "r"(c2) : "memory");
}
DEVICE void tma_reduce_add(const TensorMap* map, shared_addr from, int c0, int c1, int c2, int c3) {
  asm volatile("cp.reduce.async.bulk.tensor.4d.global.shared::cta.add.bulk_group [%0, {%2, %3, %4, %5}], [%1];"
               ::"l"(map), "r"(from), "r"(c0), "r"(c1), "r"(c2), "r"(c3) : "memory");
}
// `bytes` bytes of float32 from shared memory added to contiguous global memory; both addresses and
// the size are multiples of 16. A member of the bulk group as the others are.
DEVICE void bulk_reduce_add_f32(Global<float> to, shared_addr from, uint32_t bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;"
               ::"l"(detail::address_of(to)), "r"(from), "r"(bytes) : "memory");
}

// Ends the bulk group of this thread's stores since the last one.
DEVICE void tma_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until at most the N newest groups are unfinished: written, and seen by this thread's later reads…
template <int N> DEVICE void tma_wait() { asm volatile("cp.async.bulk.wait_group %0;" ::"n"(N) : "memory"); }
// … or only read, so that their shared memory may be written again.
template <int N> DEVICE void tma_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}

// --- wgmma: products by the four warps of a warpgroup together, asynchronously -------------------------------

// Before the first wgmma, and whenever registers that one reads or adds to were written otherwise.
DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most the N newest groups are under way; only then may their registers be touched, and
// their shared memory written.
template <int N> DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
// Keeps the compiler from moving accesses to these registers across this point.
template <class T, int n> DEVICE void keep_registers(T (&registers)[n]) {
  UNROLL for (int i = 0; i < n; ++i) {
    if constexpr (std::is_same_v<T, float>) asm volatile("" : "+f"(registers[i]) :: "memory");
    else asm volatile("" : "+r"(registers[i]) :: "memory");
  }
}

namespace detail {
template <int n> struct Width {};
#include "device/cuda/wgmma.inc"
}  // namespace detail

// d (64 x N, float32) = A B, or d += A B where `accumulate`; A is 64 x 16 and B 16 x N in shared memory,
// given by matrix_descriptor; a_mn_major and b_mn_major: their rows run along M, N instead of K.
// T is bf16 or fp16. N: those in wgmma.inc. Register d[4 j + i] of thread t of the warpgroup is
// D[16 (t / 32) + t % 32 / 4 + 8 (i / 2)][8 j + 2 (t % 4) + i % 2].
// Source: PTX ISA, "Register Fragments for wgmma.mma_async.m64nNk16".
template <class T, int N, bool a_mn_major = false, bool b_mn_major = false>
DEVICE void wgmma_ss(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  detail::wgmma_ss<a_mn_major, b_mn_major>(T(), detail::Width<N>(), d, a, b, accumulate);
}
// The same with A in registers, laid out as for mma_m16n8k16: warp w of the group has rows 16 w to 16 w + 15.
template <class T, int N, bool b_mn_major = false>
DEVICE void wgmma_rs(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  detail::wgmma_rs<b_mn_major>(T(), detail::Width<N>(), d, a, b, accumulate);
}

// --- registers a thread may use; all four warps of a warpgroup call ----------------------------------------------

// N is a multiple of 8, 24 to 256. Releases, or waits for, registers of the block's share.
template <int N> DEVICE void setmaxnreg_dec() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)); }
template <int N> DEVICE void setmaxnreg_inc() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)); }

// --- host -------------------------------------------------------------------------------------------------------

// A tensor of `rank` (2 to 5) dimensions, innermost first; T is bf16, fp16 or float. dims and box count
// elements; strides are in bytes, of dimensions 1 to rank - 1. 0, or an error for error_string.
// base: 16-byte aligned; strides: multiples of 16 under 2^40; box: 1 to 256 a dimension, its inner
// extent a multiple of 16 bytes and no longer than the swizzle's span.
// Source: CUDA driver API, cuTensorMapEncodeTiled.
template <class T>
int make_tensor_map(TensorMap* map, const void* base, int rank, const uint64_t* dims, const uint64_t* strides,
                    const uint32_t* box, SwizzleSpan span) {
  using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                              const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                              CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  // Through the runtime, so that nothing links with the driver; asked once.
  struct Found {
    void* function = nullptr;
    cudaError_t error;
    Found() {
      cudaDriverEntryPointQueryResult status;
      error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &status);
      if (error == cudaSuccess && status != cudaDriverEntryPointSuccess) error = cudaErrorNotSupported;
    }
  };
  static const Found found;
  if (found.error != cudaSuccess) return found.error;
  const CUtensorMapDataType type = std::is_same_v<T, float>  ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                                   : std::is_same_v<T, bf16> ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                             : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const CUtensorMapSwizzle swizzle = span == SwizzleSpan::bytes128  ? CU_TENSOR_MAP_SWIZZLE_128B
                                     : span == SwizzleSpan::bytes64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                     : span == SwizzleSpan::bytes32 ? CU_TENSOR_MAP_SWIZZLE_32B
                                                                    : CU_TENSOR_MAP_SWIZZLE_NONE;
  cuuint64_t dims_[5] = {}, strides_[5] = {};
  for (int i = 0; i < rank; ++i) dims_[i] = dims[i];
  for (int i = 0; i + 1 < rank; ++i) strides_[i] = strides[i];
  const cuuint32_t steps[5] = {1, 1, 1, 1, 1};
  const CUresult result = reinterpret_cast<Encode>(found.function)(
      map, type, rank, const_cast<void*>(base), dims_, strides_, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace almostgpt::device
