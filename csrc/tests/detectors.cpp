// Does every check of the emulator fire? For each a small kernel that is wrong, and its twin that is right
// and must raise nothing, under several schedules. Prints a line a case; the exit code is the number of
// failures. Long, because a case is a kernel.
//
//   g++ -std=c++17 -O2 -DALMOSTGPT_EMULATOR -I csrc csrc/tests/detectors.cpp csrc/device/emulator/*.cpp
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

#include "device/device.cuh"
#include "device/emulator/emulator.h"

namespace almostgpt::device {
namespace {

using emulator::Asynchrony;
using emulator::Error;
using emulator::Options;
using emulator::Session;
using emulator::Use;

// --- what every kernel gets ---------------------------------------------------------------------------------

constexpr int kFloats = 16384;
constexpr int kRows = 512;  // of 64 elements of bf16, or 32 floats: 128 bytes

struct Args {
  bool right;
  Global<const float> input;    // small whole numbers, as bf16
  Global<float> output;         // not initialised
  Global<float> state;          // zeros
  Global<uint32_t> counters;    // zeros
  TensorMap tile, rows;         // of the input: boxes of 64 and of 8 rows, 128-byte swizzle
  TensorMap output_tile, sums;  // of the output, like `tile`; of the state, 8 rows of 32 floats, no swizzle
};

struct Memory {
  alignas(1024) float input[kFloats], unused_0[256];  // so that no buffer follows another
  alignas(1024) float output[kFloats], unused_1[256];
  alignas(1024) float state[kFloats], unused_2[256];
  alignas(1024) uint32_t counters[64];
};
Memory memory;

struct Setup {
  unsigned blocks = 1;
  int threads = 32;
  uint32_t shared_bytes = 4096;
  bool co_resident = false;
  int card = 90;
};

TensorMap map_of(const void* base, int rows, bool of_floats) {
  TensorMap map;
  const uint64_t dims[] = {of_floats ? 32u : 64u, kRows}, strides[] = {128};
  const uint32_t box[] = {of_floats ? 32u : 64u, static_cast<uint32_t>(rows)};
  if (of_floats) make_tensor_map<float>(&map, base, 2, dims, strides, box, SwizzleSpan::none);
  else make_tensor_map<bf16>(&map, base, 2, dims, strides, box, SwizzleSpan::bytes128);
  return map;
}

template <auto kernel> void run(const Setup& setup, bool right) {
  auto* halves = reinterpret_cast<unsigned char*>(memory.input);
  for (int i = 0; i < 2 * kFloats; ++i) {
    const bf16 value = to_bf16(static_cast<float>(i * 7 % 5 - 2));
    std::memcpy(halves + 2 * i, &value, 2);
  }
  std::fill(memory.output, memory.output + kFloats, -1.f);
  std::fill(memory.state, memory.state + kFloats, 0.f);
  std::fill(memory.counters, memory.counters + 64, 0u);
  Session session(setup.card / 10, setup.card % 10);
  session.buffer("input", memory.input, sizeof memory.input, Use::input);
  session.buffer("output", memory.output, sizeof memory.output, Use::output);
  session.buffer("state", memory.state, sizeof memory.state, Use::input_output);
  session.buffer("counters", memory.counters, sizeof memory.counters, Use::input_output);
  Args args{right, Global<const float>(memory.input), Global(memory.output), Global(memory.state),
            Global(memory.counters), map_of(memory.input, 64, false), map_of(memory.input, 8, false),
            map_of(memory.output, 64, false), map_of(memory.state, 8, true)};
  launch<kernel>(LaunchShape{{setup.blocks, 1, 1}, setup.threads, setup.shared_bytes, setup.co_resident}, nullptr, args);
}

// --- cases ----------------------------------------------------------------------------------------------------

int failed = 0;

void report(bool ok, const std::string& name, const std::string& text) {
  failed += !ok;
  std::printf("%s %s: %s\n", ok ? "ok" : "FAIL", name.c_str(), text.substr(0, text.find('\n')).c_str());
}

// The kind of what it throws, "" for nothing; the message goes to `text`.
std::string kind_of(const std::function<void()>& body, std::string& text) {
  try {
    body();
  } catch (const Error& error) {
    text = error.what();
    return error.kind;
  }
  text = "nothing";
  return "";
}

void expect(const std::string& name, const std::string& kind, const std::function<void()>& body) {
  std::string text;
  const std::string found = kind_of(body, text);
  report(found == kind, name, found == kind ? text : "expected '" + kind + "', got " + text);
}

const Options kSchedules[] = {
    {0, Asynchrony::late, true, false, 0},  {0, Asynchrony::early, true, false, 0}, {1, Asynchrony::random, true, false, 0},
    {2, Asynchrony::late, true, false, 0},  {3, Asynchrony::random, true, false, 0}, {4, Asynchrony::early, true, false, 0},
};

template <auto kernel> void right(const std::string& name, const Setup& setup = {}) {
  std::string text = "nothing", kind;
  for (const Options& schedule : kSchedules) {
    emulator::set_options(schedule);
    kind = kind_of([&] { run<kernel>(setup, true); }, text);
    if (!kind.empty()) break;
  }
  emulator::set_options({});
  report(kind.empty(), name + " (right)", text);
}

template <auto kernel> void wrong(const std::string& name, const std::string& kind, const Setup& setup = {}) {
  expect(name, kind, [&] { run<kernel>(setup, false); });
}

template <auto kernel> void twins(const std::string& name, const std::string& kind, const Setup& setup = {}) {
  wrong<kernel>(name, kind, setup);
  right<kernel>(name, setup);
}

// --- shared memory --------------------------------------------------------------------------------------------

KERNEL shared_uninitialised(const Args args) {
  if (args.right) store_shared(shared_base() + 4 * thread_id(), 1.f);
  load_shared<float>(shared_base() + 4 * thread_id());
}
KERNEL shared_misaligned(const Args args) {
  store_shared(shared_base() + 8 * thread_id(), u32x2{1, 2});
  if (args.right) load_shared<u32x2>(shared_base() + 8 * thread_id());
  else load_shared<u32x2>(shared_base() + 8 * thread_id() + 4);
}
KERNEL shared_out_of_bounds(const Args args) {
  store_shared(shared_base() + 4096 - 128 + 4 * (thread_id() + (args.right ? 0 : 1)), 1);
}
KERNEL shared_no_base(const Args args) { store_shared((args.right ? shared_base() : 0) + 4 * thread_id(), 1); }
KERNEL shared_read_after_write(const Args args) {
  store_shared(shared_base() + 4 * thread_id(), 0);
  cta_sync();
  store_shared(shared_base() + 4 * thread_id(), thread_id());
  if (args.right) cta_sync();
  load_shared<int>(shared_base() + 4 * (thread_id() ^ 32));
}
KERNEL shared_write_after_read(const Args args) {
  store_shared(shared_base() + 4 * thread_id(), thread_id());
  cta_sync();
  load_shared<int>(shared_base() + 4 * (thread_id() ^ 32));
  if (args.right) cta_sync();
  store_shared(shared_base() + 4 * thread_id(), 0);
}
KERNEL shared_write_after_write(const Args args) {
  if (thread_id() == 0) store_shared(shared_base(), 1);
  if (args.right) bar_sync(3, 64);
  if (thread_id() == 33) store_shared(shared_base(), 2);
}
KERNEL shuffle_orders_nothing(const Args args) {
  store_shared(shared_base() + 4 * lane_id(), lane_id());
  if (args.right) warp_sync();
  else shfl_xor(0, 1);
  load_shared<int>(shared_base() + 4 * (lane_id() ^ 1));
}
KERNEL halves_of_a_word(const Args) {
  store_shared<uint16_t>(shared_base() + 2 * thread_id(), 1);
  cta_sync();
  store_shared<uint16_t>(shared_base() + 2 * thread_id(), load_shared<uint16_t>(shared_base() + 2 * thread_id()));
}
KERNEL part_of_a_warp(const Args args) {  // warp_sync of half a warp orders that half alone
  store_shared(shared_base() + 4 * lane_id(), 0);
  warp_sync();
  store_shared(shared_base() + 4 * lane_id(), lane_id());
  if (lane_id() < 16) warp_sync(0xffff);
  else warp_sync(0xffff0000);
  load_shared<int>(shared_base() + 4 * (lane_id() ^ (args.right ? 8 : 16)));
}

// --- warps and barriers ---------------------------------------------------------------------------------------

KERNEL half_a_warp(const Args args) {
  if (lane_id() < 16) shfl_xor(1, 1, args.right ? 0xffff : ~0u);
}
KERNEL two_operations(const Args args) {
  if (lane_id() < 16) shfl_xor(1, 1, args.right ? 0xffff : ~0u);
  else ballot(true, args.right ? 0xffff0000 : ~0u);
}
KERNEL two_calls_of_a_barrier(const Args args) {
  if (lane_id() < 16 || args.right) cta_sync();
  else cta_sync();
}
KERNEL source_outside(const Args args) {
  if (lane_id() < 16) shfl_xor(1, args.right ? 8 : 16, 0xffff);
}
KERNEL caller_outside(const Args args) { ballot(true, args.right ? ~0u : 0xffff); }
KERNEL beyond_the_warp(const Args args) {  // a source that does not exist: the own value
  store_global(args.output + lane_id(), shfl_down(static_cast<float>(lane_id()), 8));
}
KERNEL exit_before_barrier(const Args args) {
  if (!args.right && thread_id() >= 32) return;
  cta_sync();
}
KERNEL barrier_by_one_lane(const Args args) {
  if (args.right || lane_id() == 0) cta_sync();
}
KERNEL barrier_of_two_sizes(const Args args) { bar_sync(1, args.right || warp_id() == 0 ? 64 : 32); }
KERNEL barrier_of_33(const Args args) { bar_sync(1, args.right ? 32 : 33); }
KERNEL barrier_16(const Args args) { bar_sync(args.right ? 15 : 16, 32); }
KERNEL arrive_and_wait(const Args args) {
  if (warp_id() == 0) store_shared(shared_base() + 4 * lane_id(), 0);
  cta_sync();
  if (warp_id() == 0) {
    store_shared(shared_base() + 4 * lane_id(), 1);
    bar_arrive(2, 64);
  } else {
    if (args.right) bar_sync(2, 64);
    load_shared<int>(shared_base() + 4 * lane_id());
  }
}
KERNEL arrive_for_nobody(const Args args) {
  if (warp_id() == 0) bar_arrive(2, 64);
  else if (args.right) bar_sync(2, 64);
}

// --- cp.async -------------------------------------------------------------------------------------------------

template <int fault> KERNEL async_copy(const Args args) {
  store_shared(shared_base() + 16 * thread_id(), u32x4{});
  cta_sync();
  cp_async16(shared_base() + 16 * thread_id(), args.input + 4 * thread_id());
  if (args.right || fault != 0) cp_async_commit();
  if (args.right || fault != 1) cp_async_wait<0>();
  if (args.right || fault != 2) cta_sync();
  load_shared<float>(shared_base() + 16 * (thread_id() ^ 1));
}

// --- global memory ----------------------------------------------------------------------------------------------

KERNEL global_out_of_bounds(const Args args) {
  store_global(args.output + (kFloats - 32 + thread_id() + (args.right ? 0 : 1)), 1.f);
}
KERNEL global_misaligned(const Args args) { load_global_as<f32x4>(args.input + (args.right ? 4 : 1)); }
KERNEL global_input_written(const Args args) {
  store_global(args.right ? args.output : Global(const_cast<float*>(device::detail::address_of(args.input))), 1.f);
}
KERNEL global_uninitialised(const Args args) {
  if (args.right) store_global(args.output + thread_id(), 1.f);
  load_global(args.output + thread_id());
}
KERNEL global_two_writers(const Args args) { store_global(args.output + thread_id() / (args.right ? 1 : 2), 1.f); }
KERNEL global_read_after_write(const Args args) {
  store_global(args.state + thread_id(), 1.f);
  if (args.right) cta_sync();
  load_global(args.state + (thread_id() ^ 32));
}
KERNEL global_write_after_read(const Args args) {
  load_global(args.state + (thread_id() ^ 32));
  if (args.right) cta_sync();
  store_global(args.state + thread_id(), 1.f);
}
KERNEL read_only_after_write(const Args args) {
  store_global(args.state + thread_id(), 1.f);
  load_global<Cache::read_only>(args.state + thread_id() + (args.right ? 32 : 0));
}
KERNEL write_after_read_only(const Args args) {
  load_global<Cache::streaming>(args.state + thread_id());
  store_global(args.state + thread_id() + (args.right ? 32 : 0), 1.f);
}
KERNEL misaligned_copy_of_nothing(const Args args) {
  cp_async16(shared_base() + 16 * thread_id(), args.input + (args.right ? 4 : 2), false);
  cp_async_commit();
  cp_async_wait<0>();
}
KERNEL misaligned_sum(const Args args) { reduce_add_f32x4(args.state + (args.right ? 4 : 2), f32x4{1, 2, 3, 4}); }

// --- between blocks -----------------------------------------------------------------------------------------------

KERNEL blocks_write_after_write(const Args args) {
  if (thread_id() == 0) store_global(args.state + (args.right ? block_x() : 0), 1.f);
}
KERNEL blocks_read_after_write(const Args args) {
  if (thread_id() != 0) return;
  if (block_x() == 0) store_global(args.state + 5, 1.f);
  else load_global(args.state + (args.right ? 6 : 5));
}
KERNEL blocks_write_after_read(const Args args) {
  if (thread_id() != 0) return;
  if (block_x() == 0) load_global(args.state + (args.right ? 6 : 5));
  else store_global(args.state + 5, 1.f);
}
KERNEL atomic_and_plain(const Args args) {
  if (block_x() == 0) atomic_add(args.state, 1.f);
  else if (args.right) reduce_add(args.state, 1.f);
  else store_global(args.state, 1.f);
}

// The last block to finish sums what all have written. Fault 0: no barrier before the fence; 1: no fence
// by the writer; 2: none by the reader.
template <int fault> KERNEL last_block(const Args args) {
  const int blocks = grid_x();
  store_global(args.output + 64 + block_x() * 64 + thread_id(), 1.f);
  if (args.right || fault != 0) cta_sync();
  if (thread_id() == 0) {
    if (args.right || fault != 1) fence_gpu();
    const uint32_t before = atomic_add(args.counters, 1u);
    if (args.right || fault != 2) fence_gpu();
    store_shared(shared_base(), before);
  }
  cta_sync();
  if (load_shared<uint32_t>(shared_base()) + 1 != static_cast<uint32_t>(blocks)) return;
  float sum = 0;
  for (int i = 0; i < blocks; ++i) sum += load_global(args.output + 64 + i * 64 + thread_id());
  store_global(args.output + thread_id(), sum);
}
// The same by an atomic that acquires and releases.
KERNEL last_block_acq_rel(const Args args) {
  if (thread_id() == 0) {
    store_global(args.output + 64 + block_x(), 1.f);
    const uint32_t before = args.right ? atomic_add_acq_rel(args.counters, 1u) : atomic_add(args.counters, 1u);
    if (before + 1 == static_cast<uint32_t>(grid_x()))
      for (int i = 0; i < grid_x(); ++i) load_global(args.output + 64 + i);
  }
}
// A read of one block before a write of another.
KERNEL blocks_reuse(const Args args) {
  if (thread_id() != 0) return;
  load_global(args.state);
  const uint32_t before = args.right ? atomic_add_acq_rel(args.counters, 1u) : atomic_add(args.counters, 1u);
  if (before + 1 == static_cast<uint32_t>(grid_x())) store_global(args.state, 1.f);
}

// Block 0 waits for a value of block 1. Fault 0: relaxed store; 1: relaxed load.
template <int fault> KERNEL spin_wait(const Args args) {
  const Global<uint32_t> flag = args.counters;
  if (thread_id() != 0) return;
  if (block_x() == 1) {
    store_global(args.state, 7.f);
    if (args.right || fault != 0) store_release(flag, 1u);
    else store_relaxed(flag, 1u);
  } else if (block_x() == 0) {
    while ((args.right || fault != 1 ? load_acquire(flag) : load_relaxed(flag)) == 0) {}
    load_global(args.state);
  }
}
KERNEL spin_wait_fences(const Args args) {
  if (thread_id() != 0) return;
  if (block_x() == 1) {
    store_global(args.state, 7.f);
    if (args.right) fence_gpu();
    store_relaxed(args.counters, 1u);
  } else if (block_x() == 0) {
    while (load_relaxed(args.counters) == 0) {}
    fence_gpu();
    load_global(args.state);
  }
}
// All blocks wait for each other, twice.
KERNEL grid_barrier(const Args args) {
  for (uint32_t round = 1; round <= 2; ++round) {
    store_global(args.state + block_x() * 32 + thread_id(), static_cast<float>(round));
    cta_sync();
    if (thread_id() == 0) {
      atomic_add_acq_rel(args.counters, 1u);
      while (load_acquire(args.counters) < round * grid_x()) {}
    }
    if (args.right) cta_sync();
    load_global(args.state + (block_x() + 1) % grid_x() * 32 + thread_id());
    cta_sync();
    if (thread_id() == 0) {
      atomic_add_acq_rel(args.counters + 1, 1u);
      while (load_acquire(args.counters + 1) < round * grid_x()) {}
    }
    cta_sync();
  }
}
KERNEL spin_for_nobody(const Args args) {
  if (args.right && block_x() == 1 && thread_id() == 0) store_release(args.counters, 1u);
  while (load_acquire(args.counters) == 0) {}
}
KERNEL spin_by_atomics(const Args args) {  // a lock whose holder must get a turn
  if (thread_id() != 0) return;
  if (block_x() == 1) {
    if (args.right) store_release(args.counters, 1u);
  } else if (block_x() == 0) {
    while (atomic_add_acq_rel(args.counters, 0u) == 0) {}
  }
}

// --- mbarriers and TMA ----------------------------------------------------------------------------------------------

constexpr uint32_t kBox = 1024;  // bytes of a box of args.rows

KERNEL mbarrier_not_initialised(const Args args) {
  if (thread_id() != 0) return;
  if (args.right) mbar_init(shared_base(), 1);
  mbar_arrive(shared_base());
}
KERNEL mbarrier_overwritten(const Args args) {
  if (thread_id() != 0) return;
  mbar_init(shared_base(), 1);
  store_shared(shared_base() + (args.right ? 8 : 0), 5);
  mbar_arrive(shared_base());
}
KERNEL mbarrier_twice(const Args args) {
  if (thread_id() != 0) return;
  mbar_init(shared_base(), 1);
  mbar_init(shared_base() + (args.right ? 8 : 0), 1);
}
KERNEL mbarrier_seen_by_others(const Args args) {
  if (thread_id() == 0) mbar_init(shared_base(), 32);
  if (args.right) cta_sync();
  mbar_arrive(shared_base());
}
KERNEL mbarrier_orders(const Args args) {  // warp 1 waits for what warp 0 wrote
  if (thread_id() == 0) mbar_init(shared_base(), 32);
  if (warp_id() == 0) store_shared(shared_base() + 64 + 4 * lane_id(), 0);
  cta_sync();
  if (warp_id() == 0) {
    store_shared(shared_base() + 64 + 4 * lane_id(), 1);
    mbar_arrive(shared_base());
  } else {
    if (args.right) mbar_wait(shared_base(), 0);
    load_shared<int>(shared_base() + 64 + 4 * lane_id());
  }
}
KERNEL mbarrier_parity(const Args args) {
  if (thread_id() != 0) return;
  mbar_init(shared_base(), 1);
  mbar_arrive(shared_base());
  mbar_wait(shared_base(), args.right ? 0 : 1);  // of parity 1 there is no phase yet
}
KERNEL mbarrier_try_wait_spin(const Args args) {
  if (thread_id() == 0) mbar_init(shared_base(), 1);
  cta_sync();
  if (thread_id() == 32 && args.right) mbar_arrive(shared_base());
  if (thread_id() == 0)
    while (!mbar_try_wait(shared_base(), 0)) {}
}

// A box arrives, is read, and the next takes its place. Fault 0: no fence after mbar_init; 1: no wait; 2:
// none of the proxy between the two boxes; 3: 16 bytes too few; 4: no barrier before the second.
template <int fault> KERNEL two_boxes(const Args args) {
  const shared_addr barrier = shared_base() + kBox;
  store_shared(shared_base() + 16 * thread_id(), u32x4{});
  if (thread_id() != 0 || args.right || fault != 0) fence_proxy_async();
  if (thread_id() == 0) {
    mbar_init(barrier, 1);
    if (args.right || fault != 0) fence_mbarrier_init();
  }
  cta_sync();
  for (int i = 0; i < 2; ++i) {
    if (thread_id() == 0) {
      mbar_arrive_expect_tx(barrier, args.right || fault != 3 ? kBox : kBox - 16);
      tma_load(shared_base(), &args.rows, barrier, 0, 8 * i);
    }
    if (args.right || fault != 1) mbar_wait(barrier, i & 1);
    load_shared<u32x4>(shared_base() + 16 * thread_id());
    if (args.right || fault != 2) fence_proxy_async();
    if (args.right || fault != 4) cta_sync();
  }
}
// A box is made by plain stores and stored. Fault 0: no proxy fence; 1: no barrier; 2: no wait at the end;
// 3: shared memory is written again before it has been read.
template <int fault> KERNEL store_box(const Args args) {
  store_shared(shared_base() + 16 * thread_id(), u32x4{});
  fence_proxy_async();
  cta_sync();
  store_shared(shared_base() + 16 * thread_id(), u32x4{});
  if (args.right || fault != 0) fence_proxy_async();
  if (args.right || fault != 1) cta_sync();
  if (thread_id() == 0) {
    tma_reduce_add(&args.sums, shared_base(), 0, 8);
    tma_commit();
    if (!args.right && fault == 3) store_shared(shared_base(), 1.f);
    if (args.right || fault != 2) tma_wait_read<0>();
  }
}
KERNEL read_what_was_stored(const Args args) {
  for (int i = thread_id(); i < 8192 / 4; i += 32) store_shared(shared_base() + 4 * i, 1u);
  fence_proxy_async();
  cta_sync();
  if (thread_id() != 0) return;
  tma_store(&args.output_tile, shared_base(), 0, 0);
  tma_commit();
  tma_wait_read<0>();
  if (args.right) tma_wait<0>();
  load_global(args.output + 3);
}
KERNEL load_what_was_written(const Args args) {  // by a plain store, in the same kernel
  if (thread_id() != 0) return;
  const shared_addr barrier = shared_base() + kBox;
  store_global(args.state + (args.right ? 2000 : 0), 1.f);
  mbar_init(barrier, 1);
  fence_mbarrier_init();
  mbar_arrive_expect_tx(barrier, kBox);
  tma_load(shared_base(), &args.sums, barrier, 0, 0);
  mbar_wait(barrier, 0);
}
KERNEL wrong_rank(const Args args) {
  if (thread_id() != 0) return;
  const shared_addr barrier = shared_base() + kBox;
  mbar_init(barrier, 1);
  fence_mbarrier_init();
  mbar_arrive_expect_tx(barrier, kBox);
  if (args.right) tma_load(shared_base(), &args.rows, barrier, 0, 0);
  else tma_load(shared_base(), &args.rows, barrier, 0, 0, 0);
  mbar_wait(barrier, 0);
}
KERNEL no_map(const Args args) {
  TensorMap map = args.rows;
  if (!args.right) map = TensorMap{};
  prefetch_tensor_map(&map);
}
KERNEL tile_misaligned(const Args args) {
  if (thread_id() != 0) return;
  const shared_addr barrier = shared_base() + 3072;
  mbar_init(barrier, 1);
  fence_mbarrier_init();
  mbar_arrive_expect_tx(barrier, kBox);
  tma_load(shared_base() + (args.right ? 1024 : 512), &args.rows, barrier, 0, 0);
  mbar_wait(barrier, 0);
}
KERNEL sum_of_halves(const Args args) {
  if (thread_id() != 0) return;
  for (int i = 0; i < 8192 / 4; ++i) store_shared(shared_base() + 4 * i, 0);
  fence_proxy_async();
  if (args.right) tma_reduce_add(&args.sums, shared_base(), 0, 0);
  else tma_reduce_add(&args.output_tile, shared_base(), 0, 0);
  tma_commit();
  tma_wait<0>();
}
KERNEL bulk_sum(const Args args) {
  if (thread_id() == 0) {
    for (int i = 0; i < 8; ++i) store_shared(shared_base() + 4 * i, 1.f);
    fence_proxy_async();
    bulk_reduce_add_f32(args.state, shared_base(), args.right ? 32 : 24);
    tma_commit();
    tma_wait<0>();
  }
}

// --- wgmma and registers ----------------------------------------------------------------------------------------------

constexpr uint32_t kTile = 8192;  // 64 rows of 128 bytes

DEVICE uint64_t tile_operand(shared_addr tile, int k) {
  return matrix_descriptor(tile + 32 * k, 16, 1024, SwizzleSpan::bytes128);
}

// D = A B with both in shared memory. Fault 0: no wgmma_fence; 1: registers written on the way; 2: read;
// 3: not waited for; 4: descriptors differ between lanes; 5: between warps; 6: shared memory written on the
// way; 7: one warp does not take part; 8: no proxy fence.
template <int fault> KERNEL product(const Args args) {
  const auto is = [&](int number) { return !args.right && fault == number; };
  for (int i = thread_id(); i < static_cast<int>(2 * kTile / 4); i += 128) store_shared(shared_base() + 4 * i, 0x3f803f80u);
  if (!is(8)) fence_proxy_async();
  cta_sync();
  if (is(7) && warp_id() == 3) return;
  float d[32] = {};
  if (!is(0)) wgmma_fence();
  for (int k = 0; k < 4; ++k) {
    const int own = is(4) ? lane_id() & 1 : is(5) ? warp_id() & 1 : 0;
    wgmma_ss<bf16, 64>(d, tile_operand(shared_base() + 1024 * own, k), tile_operand(shared_base() + kTile, k), k > 0);
  }
  wgmma_commit();
  if (is(1)) d[5] = 0;
  const float early = d[7];
  if (is(6)) store_shared(shared_base() + kTile + 4 * thread_id(), 0);
  if (!is(3)) wgmma_wait<0>();
  keep_registers(d);
  // Every element is the sum of 64 products of 1.
  if (!is(3)) store_global(args.output + thread_id(), is(2) ? early : d[7]);
}
KERNEL registers_traded(const Args args) {  // 168 a thread at launch, of 384
  if (warp_id() < 4) {
    if (args.right) setmaxnreg_dec<24>();
  } else {
    setmaxnreg_inc<240>();
  }
}
template <int count, bool increase> KERNEL registers_changed(const Args) {
  if constexpr (increase) setmaxnreg_inc<count>();
  else setmaxnreg_dec<count>();
}
KERNEL registers_by_three_warps(const Args args) {
  if (args.right || warp_id() != 2) setmaxnreg_dec<32>();
}

KERNEL needs_mbarrier(const Args) { elect_one(); }
KERNEL does_nothing(const Args) {}

// --- what is counted ------------------------------------------------------------------------------------------------

template <class V, int stride> KERNEL store_strided(const Args) {
  store_shared(shared_base() + stride * lane_id(), V{});
}
template <int pitch> KERNEL load_matrices(const Args) {
  for (int i = lane_id(); i < 1024; i += 32) store_shared(shared_base() + 4 * i, 0);
  warp_sync();
  uint32_t r[4];
  ldmatrix_x4(r, shared_base() + pitch * lane_id());
}
template <class V, int stride> KERNEL load_strided(const Args args) {
  load_global_as<V>(args.input + stride / 4 * lane_id());
}
KERNEL copy_in_part(const Args args) {  // 3 rounds, of which the last is for the lower half of the lanes
  for (int i = thread_id(); i < 80; i += 32) store_global(args.output + i, load_global(args.input + i));
}

uint64_t counter(const std::string& name) {
  const std::string json = emulator::statistics();
  const size_t found = json.find('"' + name + "\": ");
  return found == std::string::npos ? ~uint64_t{0} : std::strtoull(json.c_str() + found + name.size() + 4, nullptr, 10);
}
template <auto kernel> void counts(const std::string& name, const std::string& what, uint64_t expected) {
  emulator::reset_statistics();
  run<kernel>({}, true);
  const uint64_t found = counter(what);
  report(found == expected, name, what + " = " + std::to_string(found) + ", by hand " + std::to_string(expected));
}

// --- planted faults ---------------------------------------------------------------------------------------------------

// Tiles of A and B by TMA through two stages into wgmma, the product out by TMA: every primitive of sm_90 that
// can be mutated.
KERNEL LAUNCH_BOUNDS(256, 1) pipeline_sm90(const Args args) {
  constexpr int kTiles = 4, kStages = 2;
  const shared_addr tiles = shared_base(), out = tiles + kStages * 2 * kTile, full = out + 2 * kTile;
  const shared_addr empty = full + 8 * kStages;
  if (thread_id() == 0) {
    for (int i = 0; i < kStages; ++i) {
      mbar_init(full + 8 * i, 1);
      mbar_init(empty + 8 * i, 4);
    }
    fence_mbarrier_init();
  }
  cta_sync();
  if (warp_id() >= 4) {
    if (thread_id() == 128) {
      for (int t = 0; t < kTiles; ++t) {
        const int stage = t % kStages;
        while (!mbar_try_wait(empty + 8 * stage, (t / kStages & 1) ^ 1)) {}
        mbar_arrive_expect_tx(full + 8 * stage, 2 * kTile);
        tma_load(tiles + 2 * kTile * stage, &args.tile, full + 8 * stage, 0, 64 * t);
        tma_load(tiles + 2 * kTile * stage + kTile, &args.tile, full + 8 * stage, 0, 64 * (kTiles + t));
      }
    }
    return;
  }
  float d[32] = {};
  for (int t = 0; t < kTiles; ++t) {
    const int stage = t % kStages;
    const shared_addr a = tiles + 2 * kTile * stage, b = a + kTile;
    mbar_wait(full + 8 * stage, t / kStages & 1);
    const uint32_t ones[4] = {0x3f803f80, 0x3f803f80, 0x3f803f80, 0x3f803f80};
    wgmma_fence();
    for (int k = 0; k < 4; ++k) wgmma_ss<bf16, 64>(d, tile_operand(a, k), tile_operand(b, k), true);
    wgmma_rs<bf16, 64>(d, ones, tile_operand(b, t), true);
    wgmma_commit();
    wgmma_wait<0>();
    if (lane_id() == 0) mbar_arrive(empty + 8 * stage);
  }
  for (int half = 0; half < 2; ++half) {  // the product and its double
    for (int j = 0; j < 16; ++j) {
      const int row = 16 * warp_id() + lane_id() / 4 + 8 * (j % 2);
      const float scale = static_cast<float>(1 + half);
      const int i = 4 * (j / 2) + 2 * (j % 2);
      store_shared(swizzled(out + 128 * row + 16 * (j / 2) + 4 * (lane_id() % 4), SwizzleSpan::bytes128),
                   pack_bf16(scale * d[i], scale * d[i + 1]));
    }
    fence_proxy_async();
    bar_sync(1, 128);
    if (thread_id() == 0) {
      tma_store(&args.output_tile, out, 0, 64 * half);
      tma_commit();
      tma_wait_read<0>();
    }
    bar_sync(1, 128);
  }
  if (thread_id() == 0) {
    tma_wait<0>();
    store_global(args.state, load_global(args.output + 64 * 32 + 7));
  }
}

// The same for the primitives of sm_80: cp.async through two stages, sums of a warp, a counter between blocks.
KERNEL pipeline_sm80(const Args args) {
  const auto fetch = [&](int t) {
    cp_async16(shared_base() + 1024 * (t & 1) + 16 * thread_id(), args.input + 256 * t + 4 * thread_id());
    cp_async_commit();
  };
  float sum = 0;
  fetch(0);
  for (int t = 0; t < 4; ++t) {
    if (t < 3) fetch(t + 1);
    else cp_async_commit();
    cp_async_wait<1>();
    cta_sync();
    for (int i = 0; i < 4; ++i) sum += to_float(bf16{load_shared<uint16_t>(shared_base() + 1024 * (t & 1) + 16 * (63 - thread_id()) + 4 * i)});
    bar_sync(1, 64);
  }
  const shared_addr own = shared_base() + 2048 + 128 * warp_id();
  store_shared(own + 4 * lane_id(), sum);
  warp_sync();
  sum += load_shared<float>(own + 4 * (lane_id() ^ 5));
  store_global(args.output + 64 + 64 * block_x() + thread_id(), sum);
  if (warp_id() == 1) {
    bar_arrive(2, 64);
    return;
  }
  bar_sync(2, 64);
  if (thread_id() != 0) return;
  fence_gpu();
  atomic_add(args.counters, 1u);
  if (block_x() == 0) {
    while (load_relaxed(args.counters) < 2) {}
    fence_gpu();
    store_global(args.output, load_global(args.output + 64 + 64 + 33));
    store_release(args.counters + 2, 1u);
  } else {
    while (load_acquire(args.counters + 2) == 0) {}
    store_global(args.output + 1, load_global(args.output));
  }
}
// Counters that hand over by acquire and release alone.
KERNEL handover(const Args args) {
  if (thread_id() != 0) return;
  store_global(args.state + block_x(), 1.f);
  const uint32_t before = atomic_add_acq_rel(args.counters, 1u);
  if (before + 1 == static_cast<uint32_t>(grid_x())) store_global(args.state + 8, load_global(args.state) + load_global(args.state + 1));
}

struct Planted {
  std::string site, mutation;
};
std::vector<Planted> planted_faults() {
  const std::string json = emulator::sites();
  std::vector<Planted> all;
  const auto quoted = [&](size_t& at) {
    const size_t begin = json.find('"', at) + 1, end = json.find('"', begin);
    at = end + 1;
    return json.substr(begin, end - begin);
  };
  for (size_t at = json.find("\"site\": "); at != std::string::npos; at = json.find("\"site\": ", at)) {
    at += 8;
    const std::string site = quoted(at);
    at = json.find('[', at);
    const size_t end = json.find(']', at);
    while (json.find('"', at) < end) all.push_back({site, quoted(at)});
  }
  return all;
}

// Each must be found by a check or change the result.
template <auto kernel> void every_fault(const std::string& name, const Setup& setup) {
  emulator::reset_statistics();
  right<kernel>(name, setup);
  run<kernel>(setup, true);
  const std::vector<float> output(memory.output, memory.output + kFloats), state(memory.state, memory.state + kFloats);
  for (const Planted& fault : planted_faults()) {
    emulator::inject(fault.site, fault.mutation);
    std::string text;
    bool found = !kind_of([&] { run<kernel>(setup, true); }, text).empty();
    if (!found && (std::memcmp(memory.output, output.data(), sizeof memory.output) ||
                   std::memcmp(memory.state, state.data(), sizeof memory.state))) {
      found = true;
      text = "another result";
    }
    emulator::inject("", "");
    report(found, name + ", " + fault.site + " " + fault.mutation, text);
  }
}

// --- all of it ----------------------------------------------------------------------------------------------------------

void memory_of_blocks() {
  const Setup two_warps{1, 64};
  twins<shared_uninitialised>("read of shared memory that nobody wrote", "uninitialised");
  twins<shared_misaligned>("8 bytes at a multiple of 4", "misaligned");
  twins<shared_out_of_bounds>("store behind shared memory", "out-of-bounds");
  twins<shared_no_base>("address without shared_base", "out-of-bounds");
  twins<shared_read_after_write>("shared read-after-write", "race", two_warps);
  twins<shared_write_after_read>("shared write-after-read", "race", two_warps);
  twins<shared_write_after_write>("shared write-after-write", "race", two_warps);
  twins<shuffle_orders_nothing>("a shuffle is no barrier", "race");
  twins<part_of_a_warp>("warp_sync of half a warp", "race");
  right<halves_of_a_word>("two threads, two halves of a word");

  twins<half_a_warp>("half a warp in a shuffle of all", "divergence");
  twins<two_operations>("shuffle and ballot at once", "divergence");
  twins<source_outside>("shuffle from outside of the mask", "divergence");
  twins<caller_outside>("caller outside of the mask", "divergence");
  twins<two_calls_of_a_barrier>("half a warp in another call of the barrier", "divergence", two_warps);
  twins<exit_before_barrier>("return before a barrier", "deadlock", two_warps);
  twins<barrier_by_one_lane>("barrier by one lane", "deadlock", two_warps);
  twins<barrier_of_two_sizes>("barrier with two counts", "barrier", two_warps);
  twins<barrier_of_33>("barrier of 33 threads", "barrier");
  twins<barrier_16>("barrier 16", "barrier");
  twins<arrive_and_wait>("arrive without wait", "race", two_warps);
  twins<arrive_for_nobody>("arrive where nobody waits", "exit", two_warps);
  run<beyond_the_warp>({}, true);
  report(memory.output[3] == 11 && memory.output[30] == 30, "shuffle from beyond the warp", "the own value");

  twins<async_copy<0>>("cp.async without commit", "in-flight");
  twins<async_copy<1>>("cp.async without wait", "in-flight");
  twins<async_copy<2>>("cp.async without barrier", "race");

  twins<global_out_of_bounds>("store behind a buffer", "out-of-bounds");
  twins<global_misaligned>("16 bytes at a multiple of 4", "misaligned");
  twins<global_input_written>("input written", "input-written", {1, 1});
  twins<global_uninitialised>("read of an output that nobody wrote", "uninitialised");
  twins<global_two_writers>("two threads write a word", "race");
  twins<global_read_after_write>("global read-after-write", "race", two_warps);
  twins<global_write_after_read>("global write-after-read", "race", two_warps);
  twins<read_only_after_write>("read-only load of what was written", "read-only");
  twins<write_after_read_only>("write of what was read as read-only", "read-only");
  twins<misaligned_copy_of_nothing>("cp.async of nothing at a multiple of 8", "misaligned");
  twins<misaligned_sum>("sum of four floats at a multiple of 8", "misaligned");
}

void between_blocks() {
  const Setup two{2, 32}, four{4, 64}, together{2, 32, 4096, true};
  twins<blocks_write_after_write>("two blocks write a word", "race", two);
  twins<blocks_read_after_write>("read of another block's store", "race", two);
  twins<blocks_write_after_read>("write of what another block reads", "race", two);
  twins<atomic_and_plain>("atomic and plain store", "race", {2, 1});
  twins<last_block<0>>("last block, no barrier before the fence", "race", four);
  twins<last_block<1>>("last block, no fence by the writer", "race", four);
  twins<last_block<2>>("last block, no fence by the reader", "race", four);
  twins<last_block_acq_rel>("last block, relaxed atomic", "race", four);
  twins<blocks_reuse>("read, relaxed atomic, write", "race", two);
  twins<spin_wait<0>>("spin-wait, relaxed store", "race", together);
  twins<spin_wait<1>>("spin-wait, relaxed load", "race", together);
  twins<spin_wait_fences>("spin-wait, one fence missing", "race", together);
  twins<grid_barrier>("barrier of the grid", "race", {5, 32, 4096, true});
  twins<spin_for_nobody>("all blocks spin", "deadlock", together);
  twins<spin_by_atomics>("spin by an atomic that changes nothing", "deadlock", together);
  wrong<spin_for_nobody>("a block waits for one that has not begun", "deadlock", two);
}

void hopper() {
  const Setup two_warps{1, 64}, tiles{1, 128, 2 * kTile + 1024}, large{1, 32, kTile};
  twins<mbarrier_not_initialised>("mbarrier not initialised", "mbarrier");
  twins<mbarrier_overwritten>("mbarrier overwritten", "mbarrier");
  twins<mbarrier_twice>("mbarrier initialised twice", "mbarrier");
  twins<mbarrier_seen_by_others>("mbarrier used before a barrier", "race");
  twins<mbarrier_orders>("mbarrier without wait", "race", two_warps);
  right<mbarrier_parity>("wait for the phase that is complete");
  twins<mbarrier_try_wait_spin>("mbar_try_wait for nothing", "deadlock", two_warps);
  twins<two_boxes<0>>("mbarrier without fence_mbarrier_init", "proxy", two_warps);
  twins<two_boxes<1>>("TMA load without wait", "race", two_warps);
  twins<two_boxes<2>>("TMA load over what was read, no proxy fence", "proxy", two_warps);
  twins<two_boxes<3>>("16 bytes too few expected", "deadlock", two_warps);
  twins<two_boxes<4>>("TMA load over what is being read", "in-flight", two_warps);
  twins<store_box<0>>("TMA store without proxy fence", "proxy", two_warps);
  twins<store_box<1>>("TMA store without barrier", "race", two_warps);
  twins<store_box<2>>("return before the TMA store has read", "exit", two_warps);
  twins<store_box<3>>("write of what a TMA store reads", "race", two_warps);
  twins<read_what_was_stored>("read after tma_wait_read", "race", large);
  twins<load_what_was_written>("TMA load of a plain store", "proxy");
  twins<wrong_rank>("three coordinates for two dimensions", "tma");
  twins<no_map>("no tensor map", "tma");
  twins<tile_misaligned>("swizzled tile at half its pattern", "misaligned");
  twins<sum_of_halves>("tma_reduce_add of bf16", "tma", large);
  twins<bulk_sum>("bulk sum of 24 bytes", "misaligned");

  twins<product<0>>("no wgmma_fence", "wgmma", tiles);
  twins<product<1>>("register written while wgmma is under way", "wgmma", tiles);
  twins<product<3>>("wgmma not waited for", "exit", tiles);
  twins<product<4>>("descriptors differ between lanes", "wgmma", tiles);
  twins<product<5>>("descriptors differ between warps", "wgmma", tiles);
  twins<product<6>>("operand written while wgmma is under way", "race", tiles);
  twins<product<7>>("three warps of a warpgroup", "wgmma", tiles);
  twins<product<8>>("operand written without proxy fence", "proxy", tiles);
  run<product<2>>(tiles, false);
  report(std::isnan(memory.output[0]), "register read while wgmma is under way", "NaN");
  run<product<2>>(tiles, true);
  report(memory.output[0] == 64, "the same after the wait (right)", "64");

  const Setup three_groups{1, 384, 1024};
  twins<registers_traded>("more registers than there are", "registers", three_groups);
  wrong<registers_changed<232, false>>("setmaxnreg_dec up", "registers", three_groups);
  wrong<registers_changed<24, true>>("setmaxnreg_inc down", "registers", three_groups);
  wrong<registers_changed<100, false>>("setmaxnreg of 100", "registers", three_groups);
  right<registers_changed<96, false>>("setmaxnreg of 96", three_groups);
  twins<registers_by_three_warps>("setmaxnreg by three warps", "registers", {1, 128});

  wrong<needs_mbarrier>("sm_90 primitive on 8.0", "capability", {1, 32, 0, false, 80});
  wrong<needs_mbarrier>("sm_90 primitive on 8.9", "capability", {1, 32, 0, false, 89});
  right<needs_mbarrier>("sm_90 primitive on 10.0", {1, 32, 0, false, 100});
  wrong<product<9>>("wgmma on 10.0", "capability", {1, 128, 2 * kTile, false, 100});
  wrong<registers_changed<32, false>>("setmaxnreg on 12.0", "capability", {1, 128, 0, false, 120});
}

void tensor_maps() {
  TensorMap map;
  struct Tensor {
    const void* base = memory.input;
    int rank = 2;
    uint64_t dims[5] = {64, 512, 1, 1, 1}, strides[4] = {128, 65536, 65536, 65536};
    uint32_t box[5] = {64, 8, 1, 1, 1};
    SwizzleSpan span = SwizzleSpan::bytes128;
  };
  const auto refused = [&](const char* name, const std::function<void(Tensor&)>& change, const char* kind = "tensor-map") {
    expect(std::string("tensor map: ") + name, kind, [&] {
      Tensor t;
      change(t);
      make_tensor_map<bf16>(&map, t.base, t.rank, t.dims, t.strides, t.box, t.span);
    });
  };
  refused("as it should be (right)", [](Tensor&) {}, "");
  refused("base at 8", [](Tensor& t) { t.base = reinterpret_cast<unsigned char*>(memory.input) + 8; });
  refused("rank 1", [](Tensor& t) { t.rank = 1; });
  refused("rank 6", [](Tensor& t) { t.rank = 6; });
  refused("no rows", [](Tensor& t) { t.dims[1] = 0; });
  refused("stride of 120", [](Tensor& t) { t.strides[0] = 120; });
  refused("stride of 2^40", [](Tensor& t) { t.strides[0] = uint64_t{1} << 40; });
  refused("box of 257 rows", [](Tensor& t) { t.box[1] = 257; });
  refused("box of no rows", [](Tensor& t) { t.box[1] = 0; });
  refused("box 8 bytes wide", [](Tensor& t) { t.box[0] = 4; t.span = SwizzleSpan::none; });
  refused("box wider than the span", [](Tensor& t) { t.span = SwizzleSpan::bytes64; });
}

void limits() {
  struct { int card, shared_bytes, multiprocessors; } const cards[] = {
      {80, 163 * 1024, 108}, {86, 99 * 1024, 84}, {89, 99 * 1024, 142}, {90, 227 * 1024, 132}, {100, 227 * 1024, 148}, {120, 99 * 1024, 170}};
  for (const auto& card : cards) {
    const auto bytes = static_cast<uint32_t>(card.shared_bytes);
    const std::string name = "card " + std::to_string(card.card);
    right<does_nothing>(name + ", all of its shared memory", {1, 32, bytes, false, card.card});
    wrong<does_nothing>(name + ", a byte more", "launch", {1, 32, bytes + 1, false, card.card});
    const auto blocks = static_cast<unsigned>(card.multiprocessors);
    right<does_nothing>(name + ", a co-resident block each", {blocks, 32, bytes, true, card.card});
    wrong<does_nothing>(name + ", a co-resident block more", "launch", {blocks + 1, 32, bytes, true, card.card});
  }
  wrong<does_nothing>("1025 threads", "launch", {1, 1025});
  wrong<does_nothing>("no threads", "launch", {1, 0});
  wrong<does_nothing>("no blocks", "launch", {0, 32});
  emulator::set_options({0, Asynchrony::late, true, false, 2});
  right<does_nothing>("co-resident, by threads: 4 of 1024 on 2 multiprocessors", {4, 1024, 0, true});
  emulator::set_options({0, Asynchrony::late, true, false, 2});
  wrong<does_nothing>("co-resident, by threads: 5", "launch", {5, 1024, 0, true});
  wrong<does_nothing>("co-resident on 8.6, by threads: 3", "launch", {3, 1024, 0, true, 86});
  wrong<does_nothing>("co-resident on 8.6, by blocks: 33", "launch", {33, 32, 0, true, 86});
  emulator::set_options({});
  expect("grid with 65536 in y", "launch", [] {
    Session session(9, 0);
    launch<does_nothing>(LaunchShape{{1, 65536, 1}, 32, 0, false}, nullptr, Args{});
  });
  expect("launch without a session", "session", [] { launch<does_nothing>(LaunchShape{{}, 32, 0, false}, nullptr, Args{}); });
  expect("a session in a session", "session", [] { Session outer(9, 0), inner(9, 0); });
  expect("card 7.5", "card", [] { Session session(7, 5); });
  expect("buffers that overlap", "session", [] {
    Session session(9, 0);
    session.buffer("a", memory.input, 64, Use::input);
    session.buffer("b", memory.input + 8, 64, Use::output);
  });
}

void counted() {
  counts<store_strided<float, 4>>("4 bytes, neighbours", "shared_conflicts", 0);
  counts<store_strided<float, 8>>("4 bytes, every second", "shared_conflicts", 1);
  counts<store_strided<float, 128>>("4 bytes, all in a bank", "shared_conflicts", 31);
  counts<store_strided<uint16_t, 2>>("2 bytes, neighbours", "shared_conflicts", 0);
  counts<store_strided<u32x2, 8>>("8 bytes, neighbours", "shared_conflicts", 0);
  counts<store_strided<u32x2, 16>>("8 bytes, every second", "shared_conflicts", 2);
  counts<store_strided<u32x4, 16>>("16 bytes, neighbours", "shared_conflicts", 0);
  counts<store_strided<u32x4, 32>>("16 bytes, every second", "shared_conflicts", 4);
  counts<load_matrices<16>>("ldmatrix, rows of 16 bytes", "shared_conflicts", 0);
  counts<load_matrices<128>>("ldmatrix, rows of 128 bytes", "shared_conflicts", 28);
  counts<load_strided<float, 4>>("load of neighbours", "global_sectors", 4);
  counts<load_strided<float, 32>>("load of a word a sector", "global_sectors", 32);
  counts<load_strided<float, 0>>("load of one word by all", "global_sectors", 1);
  counts<load_strided<f32x4, 16>>("load of 512 bytes", "global_sectors", 16);
  counts<load_strided<f32x4, 16>>("load of 512 bytes", "global_read_bytes", 512);
  counts<copy_in_part>("copy of 80 floats", "global_sectors", 20);
  counts<copy_in_part>("copy of 80 floats", "global_read_bytes", 320);
  counts<copy_in_part>("copy of 80 floats", "global_written_bytes", 320);
  const bool named = emulator::statistics().find("\"copy_in_part\": {\"launches\": 1, \"blocks\": 1") != std::string::npos &&
                     emulator::statistics().find("\"input\": {\"read\": 320, \"written\": 0}") != std::string::npos &&
                     emulator::statistics().find("\"output\": {\"read\": 0, \"written\": 320}") != std::string::npos;
  report(named, "kernel and buffers by name", emulator::statistics().substr(0, 100));
  emulator::reset_statistics();
  report(emulator::statistics() == "{\"kernels\": {}}" && emulator::sites() == "[]", "reset", emulator::statistics());
}

void messages() {
  std::string text;
  kind_of([] { run<shared_read_after_write>({1, 64}, false); }, text);
  const auto has = [&](const char* part) { return text.find(part) != std::string::npos; };
  report(has("kernel shared_read_after_write") && has("block (0, 0, 0)") && has("warp") && has("this access:  detectors.cpp:") &&
             has("other access: detectors.cpp:") && has("what to do: put a barrier"), "a race says all", text);
  kind_of([] { run<store_box<3>>({1, 64}, false); }, text);
  report(has("kernel store_box<3>"), "template arguments are in the name", text);

  const auto refused = [](const std::function<void()>& body) {
    try {
      body();
    } catch (const std::invalid_argument&) {
      return true;
    }
    return false;
  };
  report(refused([] { emulator::inject("a.cu:1 cta_sync", "explode"); }), "unknown mutation", "std::invalid_argument");
  struct { const char *name, *bad, *good; } const variables[] = {
      {"ALMOSTGPT_EMULATOR_SEED", "-1", "7"}, {"ALMOSTGPT_EMULATOR_ASYNC", "soon", "early"}, {"ALMOSTGPT_EMULATOR_CHECK", "yes", "0"},
      {"ALMOSTGPT_EMULATOR_ABORT", "2", "0"}, {"ALMOSTGPT_EMULATOR_MULTIPROCESSORS", "8x", "8"}};
  for (const auto& variable : variables) {
    setenv(variable.name, variable.bad, 1);
    const bool bad = refused([] { emulator::options_from_environment(); });
    setenv(variable.name, variable.good, 1);
    const bool good = !refused([] { emulator::options_from_environment(); });
    report(bad && good, variable.name, std::string("refuses ") + variable.bad + ", takes " + variable.good);
  }
  const Options options = emulator::options_from_environment();
  report(options.seed == 7 && options.asynchrony == Asynchrony::early && !options.check && options.multiprocessors == 8,
         "options from the environment", "as set");
  for (const auto& variable : variables) unsetenv(variable.name);
}

}  // namespace
}  // namespace almostgpt::device

int main() {
  using namespace almostgpt::device;
  almostgpt::emulator::set_options({});
  memory_of_blocks();
  between_blocks();
  hopper();
  tensor_maps();
  limits();
  counted();
  messages();
  every_fault<pipeline_sm90>("pipeline of sm_90", {1, 256, 6 * kTile + 1024});
  every_fault<pipeline_sm80>("pipeline of sm_80", {2, 64, 4096, true});
  every_fault<handover>("counter between blocks", {2, 32});
  std::printf("%d failed\n", failed);
  return failed;
}
