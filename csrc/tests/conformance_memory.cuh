// Cases: shared and global memory, and what blocks do together.
#pragma once

#include "tests/conformance.h"

namespace almostgpt::conformance {
namespace {

// --- shared memory ------------------------------------------------------------------------------------

// Written V by V, read back V by V by the opposite thread and byte by byte.
template <class V> KERNEL shared_widths_kernel(const Global<const uint8_t> in, const Global<uint8_t> out) {
  constexpr int width = sizeof(V);
  const shared_addr base = shared_base();
  const int t = thread_id(), n = block_size();
  store_shared<V>(base + t * width, load_global_as<V>(in + t * width));
  cta_sync();
  store_global_as<V>(out + t * width, load_shared<V>(base + (n - 1 - t) * width));
  for (int i = t; i < n * width; i += n) store_global(out + n * width + i, load_shared<uint8_t>(base + i));
}

template <class V> void check_shared(Run& run) {
  constexpr int n = 64, width = sizeof(V);
  const auto bytes = generate<uint8_t>(n * width, [](size_t i) { return static_cast<uint8_t>(mix(i)); });
  std::vector<uint8_t> want;
  for (int i = 0; i < n * width; ++i) want.push_back(bytes[(n - 1 - i / width) * width + i % width]);
  want.insert(want.end(), bytes.begin(), bytes.end());
  const auto in = run.input(bytes);
  const auto out = run.output<uint8_t>(want.size());
  run.launch<shared_widths_kernel<V>>({{1}, n, n * width}, in, out);
  run.expect(out, want, std::to_string(width) + " bytes");
}

CASE(shared_memory, "load_shared store_shared shared_base") {
  check_shared<uint8_t>(run);
  check_shared<bf16>(run);
  check_shared<uint16_t>(run);
  check_shared<float>(run);
  check_shared<uint32_t>(run);
  check_shared<u32x2>(run);
  check_shared<u32x4>(run);
  check_shared<f32x4>(run);
}

// --- global memory ------------------------------------------------------------------------------------

template <class V, Cache load, Cache store>
KERNEL copy_kernel(const Global<const uint8_t> in, const Global<uint8_t> out) {
  const int at = thread_id() * static_cast<int>(sizeof(V));
  store_global_as<V, store>(out + at, load_global_as<V, load>(in + at));
}
template <class T, Cache load, Cache store>
KERNEL copy_elements_kernel(const Global<const T> in, const Global<T> out) {
  store_global<store>(out + thread_id(), load_global<load>(in + thread_id()));
}

template <class V, Cache load, Cache store> void check_copy(Run& run) {
  const auto bytes = generate<uint8_t>(64 * sizeof(V), [](size_t i) { return static_cast<uint8_t>(mix(i)); });
  const auto in = run.input(bytes);
  const auto out = run.output<uint8_t>(bytes.size()), out_elements = run.output<uint8_t>(bytes.size());
  run.launch<copy_kernel<V, load, store>>({{1}, 64}, in, out);
  run.expect(out, bytes, "as " + std::to_string(sizeof(V)) + " bytes");
  run.launch<copy_elements_kernel<V, load, store>>({{1}, 64}, in.template as<const V>(), out_elements.template as<V>());
  run.expect(out_elements, bytes, "elements of " + std::to_string(sizeof(V)) + " bytes");
}

template <class V> void check_caches(Run& run) {
  check_copy<V, Cache::normal, Cache::normal>(run);
  check_copy<V, Cache::read_only, Cache::streaming>(run);
  check_copy<V, Cache::streaming, Cache::streaming>(run);
}

CASE(global_memory, "load_global load_global_as store_global store_global_as Cache Global") {
  check_caches<uint8_t>(run);
  check_caches<fp16>(run);
  check_caches<float>(run);
  check_caches<u32x2>(run);
  check_caches<u32x4>(run);
}

// --- between blocks -----------------------------------------------------------------------------------

constexpr int kBlocks = 24;

// Each block leaves a part; the last to count itself adds them all up. One thread counts, for the whole
// block: between barriers, and with a relaxed counter between fences …
KERNEL last_block_fence_kernel(const Global<uint32_t> parts, const Global<uint32_t> counter,
                               const Global<uint32_t> out) {
  store_global(parts + block_x() * 32 + thread_id(), static_cast<uint32_t>(block_x() * 1000 + thread_id()));
  warp_sync();
  uint32_t before = 0;
  if (thread_id() == 0) {
    fence_gpu();
    before = atomic_add(counter, 1u);
    fence_gpu();
  }
  warp_sync();
  if (shfl_idx(before, 0) != static_cast<uint32_t>(grid_x() - 1)) return;
  uint32_t sum = 0;
  for (int block = 0; block < grid_x(); ++block) sum += load_global(parts + block * 32 + thread_id());
  store_global(out + thread_id(), sum);
}

// … or with one that acquires and releases.
KERNEL last_block_acq_rel_kernel(const Global<uint32_t> parts, const Global<uint32_t> counter,
                                 const Global<uint32_t> out) {
  const int n = block_size();
  store_global(parts + block_x() * n + thread_id(), static_cast<uint32_t>(block_x() * 1000 + thread_id()));
  cta_sync();
  if (thread_id() == 0) store_shared<uint32_t>(shared_base(), atomic_add_acq_rel(counter, 1));
  cta_sync();
  if (load_shared<uint32_t>(shared_base()) != static_cast<uint32_t>(grid_x() - 1)) return;
  uint32_t sum = 0;
  for (int block = 0; block < grid_x(); ++block) sum += load_global(parts + block * n + thread_id());
  store_global(out + thread_id(), sum);
}

template <auto kernel> void check_last_block(Run& run, int threads) {
  const auto parts = run.output<uint32_t>(kBlocks * threads), out = run.output<uint32_t>(threads);
  const auto counter = run.input_output<uint32_t>({0});
  run.launch<kernel>({{kBlocks}, threads, 16}, parts, counter, out);
  run.expect(out, generate<uint32_t>(threads, [](size_t t) {
    return static_cast<uint32_t>(kBlocks * (kBlocks - 1) / 2 * 1000 + kBlocks * t);
  }), "sum");
  run.expect(counter, {uint32_t{kBlocks}}, "counter");
}

CASE(last_block_fence, "fence_gpu atomic_add") { check_last_block<last_block_fence_kernel>(run, 32); }
CASE(last_block_acq_rel, "atomic_add_acq_rel") { check_last_block<last_block_acq_rel_kernel>(run, 96); }

// A chain: each block waits for the one before, so all of them have to be resident. `ordered` words, or
// relaxed ones between fences.
template <bool ordered>
KERNEL chain_kernel(const Global<uint32_t> values, const Global<uint32_t> flags) {
  const int block = block_x(), t = thread_id();
  if (block > 0) {
    if (t == 0) {
      if (ordered) while (load_acquire(flags + block - 1) == 0) {}
      else {
        while (load_relaxed(flags + block - 1) == 0) {}
        fence_gpu();
      }
    }
    cta_sync();
  }
  const uint32_t before = block > 0 ? load_global(values + (block - 1) * block_size() + t) : 0u;
  store_global(values + block * block_size() + t, before * 3 + t + 1);
  cta_sync();
  if (t == 0) {
    if (ordered) {
      store_release(flags + block, 1u);
    } else {
      fence_gpu();
      store_relaxed(flags + block, 1u);
    }
  }
}

template <bool ordered> void check_chain(Run& run) {
  constexpr int threads = 64;
  const int blocks = run.card().multiprocessors < 8 ? run.card().multiprocessors : 8;
  const auto values = run.output<uint32_t>(blocks * threads);
  const auto flags = run.input_output(std::vector<uint32_t>(blocks, 0));
  LaunchShape shape{{static_cast<unsigned>(blocks)}, threads};
  shape.co_resident = true;
  run.launch<chain_kernel<ordered>>(shape, values, flags);
  std::vector<uint32_t> want(blocks * threads);
  for (int i = 0; i < blocks * threads; ++i) want[i] = (i < threads ? 0 : want[i - threads] * 3) + i % threads + 1;
  run.expect(values, want, "chain");
  run.expect(flags, std::vector<uint32_t>(blocks, 1), "flags");
}

CASE(acquire_release, "load_acquire store_release launch") { check_chain<true>(run); }
CASE(relaxed_and_fences, "load_relaxed store_relaxed fence_gpu launch") { check_chain<false>(run); }

// Sums of whole numbers: exact in any order.
KERNEL atomics_kernel(const Global<float> sums, const Global<uint32_t> counts, const Global<uint32_t> tickets) {
  const int i = block_x() * block_size() + thread_id();
  const float value = static_cast<float>(i % 17 - 8);
  store_global(tickets + i, atomic_add(counts, 1u));
  atomic_add(counts + 1, static_cast<uint32_t>(i));
  atomic_add_acq_rel(counts + 2, 2);
  atomic_add(sums + i % 4, value);
  reduce_add(sums + 4 + i % 4, 2 * value);
  reduce_add_f32x4(sums + 8 + 4 * (i % 2), f32x4{value, 2 * value, 3 * value, 1});
}

CASE(atomics, "atomic_add atomic_add_acq_rel reduce_add reduce_add_f32x4") {
  constexpr int n = 4 * 96;
  const auto sums = run.input_output(std::vector<float>(16, 1));
  const auto counts = run.input_output<uint32_t>({0, 0, 0});
  const auto tickets = run.output<uint32_t>(n);
  run.launch<atomics_kernel>({{4}, 96}, sums, counts, tickets);
  std::vector<float> want(16, 1);
  for (int i = 0; i < n; ++i) {
    const auto value = static_cast<float>(i % 17 - 8);
    want[i % 4] += value;
    want[4 + i % 4] += 2 * value;
    for (int j = 0; j < 4; ++j) want[8 + 4 * (i % 2) + j] += j < 3 ? (j + 1) * value : 1;
  }
  run.expect(sums, want, "floats");
  run.expect(counts, {n, n * (n - 1) / 2, 2 * n}, "counts");
  // Each old value went to one thread; to which is not fixed, so they are not recorded.
  std::vector<bool> seen(n);
  for (const uint32_t ticket : tickets.read()) {
    require(ticket < n && !seen[ticket], "an old value was given twice");
    seen[ticket] = true;
  }
}

}  // namespace
}  // namespace almostgpt::conformance
