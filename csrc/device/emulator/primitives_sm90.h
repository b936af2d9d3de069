// What Hopper adds (sm_90a). On a card without it these throw Error("capability").
#pragma once

#include "device/emulator/primitives_core.h"

namespace almostgpt::device {

using TensorMap = emulator::TensorMap;

DEVICE bool elect_one(Location at = Location::here()) {
  emulator::require_sm90("elect_one", at);
  emulator::collective("elect_one", nullptr, ~0u, [](void**, uint32_t, Location) {}, at);
  return lane_id() == 0;
}

// --- mbarriers ------------------------------------------------------------------------------------------------

DEVICE void mbar_init(shared_addr barrier, uint32_t arrivals, Location at = Location::here()) {
  emulator::mbar_init(barrier, arrivals, at);
}
DEVICE void mbar_arrive(shared_addr barrier, Location at = Location::here()) { emulator::mbar_arrive(barrier, at); }
DEVICE void mbar_arrive_expect_tx(shared_addr barrier, uint32_t bytes, Location at = Location::here()) {
  emulator::mbar_arrive_expect_tx(barrier, bytes, at);
}
DEVICE bool mbar_try_wait(shared_addr barrier, uint32_t parity, Location at = Location::here()) {
  return emulator::mbar_try_wait(barrier, parity, at);
}
DEVICE void mbar_wait(shared_addr barrier, uint32_t parity, Location at = Location::here()) {
  emulator::mbar_wait(barrier, parity, at);
}
DEVICE void fence_mbarrier_init(Location at = Location::here()) { emulator::fence_mbarrier_init(at); }
DEVICE void fence_proxy_async(Location at = Location::here()) { emulator::fence_proxy_async(at); }

// --- TMA ------------------------------------------------------------------------------------------------------

DEVICE void prefetch_tensor_map(const TensorMap* map, Location at = Location::here()) {
  emulator::prefetch_tensor_map(map, at);
}

DEVICE void tma_load(shared_addr to, const TensorMap* map, shared_addr barrier, int c0, int c1,
                     Location at = Location::here()) {
  const int coordinates[] = {c0, c1};
  emulator::tma_load(to, map, barrier, coordinates, 2, at);
}
DEVICE void tma_load(shared_addr to, const TensorMap* map, shared_addr barrier, int c0, int c1, int c2,
                     Location at = Location::here()) {
  const int coordinates[] = {c0, c1, c2};
  emulator::tma_load(to, map, barrier, coordinates, 3, at);
}
DEVICE void tma_load(shared_addr to, const TensorMap* map, shared_addr barrier, int c0, int c1, int c2, int c3,
                     Location at = Location::here()) {
  const int coordinates[] = {c0, c1, c2, c3};
  emulator::tma_load(to, map, barrier, coordinates, 4, at);
}
DEVICE void tma_load(shared_addr to, const TensorMap* map, shared_addr barrier, int c0, int c1, int c2, int c3, int c4,
                     Location at = Location::here()) {
  const int coordinates[] = {c0, c1, c2, c3, c4};
  emulator::tma_load(to, map, barrier, coordinates, 5, at);
}

DEVICE void tma_store(const TensorMap* map, shared_addr from, int c0, int c1, Location at = Location::here()) {
  const int coordinates[] = {c0, c1};
  emulator::tma_store(map, from, coordinates, 2, false, at);
}
DEVICE void tma_store(const TensorMap* map, shared_addr from, int c0, int c1, int c2, Location at = Location::here()) {
  const int coordinates[] = {c0, c1, c2};
  emulator::tma_store(map, from, coordinates, 3, false, at);
}
DEVICE void tma_store(const TensorMap* map, shared_addr from, int c0, int c1, int c2, int c3,
                      Location at = Location::here()) {
  const int coordinates[] = {c0, c1, c2, c3};
  emulator::tma_store(map, from, coordinates, 4, false, at);
}
DEVICE void tma_store(const TensorMap* map, shared_addr from, int c0, int c1, int c2, int c3, int c4,
                      Location at = Location::here()) {
  const int coordinates[] = {c0, c1, c2, c3, c4};
  emulator::tma_store(map, from, coordinates, 5, false, at);
}

DEVICE void tma_reduce_add(const TensorMap* map, shared_addr from, int c0, int c1, Location at = Location::here()) {
  const int coordinates[] = {c0, c1};
  emulator::tma_store(map, from, coordinates, 2, true, at);
}
DEVICE void tma_reduce_add(const TensorMap* map, shared_addr from, int c0, int c1, int c2,
                           Location at = Location::here()) {
  const int coordinates[] = {c0, c1, c2};
  emulator::tma_store(map, from, coordinates, 3, true, at);
}
DEVICE void tma_reduce_add(const TensorMap* map, shared_addr from, int c0, int c1, int c2, int c3,
                           Location at = Location::here()) {
  const int coordinates[] = {c0, c1, c2, c3};
  emulator::tma_store(map, from, coordinates, 4, true, at);
}
DEVICE void bulk_reduce_add_f32(Global<float> to, shared_addr from, uint32_t bytes, Location at = Location::here()) {
  emulator::bulk_reduce_add_f32(detail::address_of(to), from, bytes, at);
}

DEVICE void tma_commit(Location at = Location::here()) { emulator::tma_commit(at); }
template <int N> void tma_wait(Location at = Location::here()) { emulator::tma_wait(N, at); }
template <int N> void tma_wait_read(Location at = Location::here()) { emulator::tma_wait_read(N, at); }

// --- wgmma ----------------------------------------------------------------------------------------------------

DEVICE void wgmma_fence(Location at = Location::here()) { emulator::wgmma_fence(at); }
DEVICE void wgmma_commit(Location at = Location::here()) { emulator::wgmma_commit(at); }
template <int N> void wgmma_wait(Location at = Location::here()) { emulator::wgmma_wait(N, at); }
template <class T, int n> void keep_registers(T (&)[n]) {}

namespace detail {
// Those of device/cuda/wgmma.inc.
template <int N> constexpr bool is_wgmma_width = N == 16 || N == 32 || N == 64 || N == 80 || N == 96 || N == 128 ||
                                                 N == 160 || N == 176 || N == 192 || N == 256;
template <class T> constexpr bool is_wgmma_type = std::is_same_v<T, bf16> || std::is_same_v<T, fp16>;
}  // namespace detail

template <class T, int N, bool a_mn_major = false, bool b_mn_major = false>
void wgmma_ss(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate, Location at = Location::here()) {
  static_assert(detail::is_wgmma_width<N> && detail::is_wgmma_type<T>);
  emulator::wgmma({d, nullptr, a, b, N, accumulate, a_mn_major, b_mn_major, std::is_same_v<T, fp16>}, at);
}
template <class T, int N, bool b_mn_major = false>
void wgmma_rs(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate, Location at = Location::here()) {
  static_assert(detail::is_wgmma_width<N> && detail::is_wgmma_type<T>);
  emulator::wgmma({d, a, 0, b, N, accumulate, false, b_mn_major, std::is_same_v<T, fp16>}, at);
}

// --- registers ------------------------------------------------------------------------------------------------

template <int N> void setmaxnreg_dec(Location at = Location::here()) { emulator::setmaxnreg(N, false, at); }
template <int N> void setmaxnreg_inc(Location at = Location::here()) { emulator::setmaxnreg(N, true, at); }

// --- host -----------------------------------------------------------------------------------------------------

template <class T>
int make_tensor_map(TensorMap* map, const void* base, int rank, const uint64_t* dims, const uint64_t* strides,
                    const uint32_t* box, SwizzleSpan span) {
  static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, fp16> || std::is_same_v<T, float>);
  emulator::make_tensor_map(map, base, sizeof(T), std::is_same_v<T, float>, rank, dims, strides, box, span);
  return 0;
}

}  // namespace almostgpt::device
