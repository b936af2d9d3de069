// Cases: types, launches, threads, barriers and warps.
#pragma once

#include "tests/conformance.h"

namespace almostgpt::conformance {
namespace {

// --- types --------------------------------------------------------------------------------------------

static_assert(sizeof(bf16) == 2 && sizeof(fp16) == 2 && alignof(bf16) == 2);
static_assert(sizeof(u32x2) == 8 && alignof(u32x2) == 8);
static_assert(sizeof(u32x4) == 16 && alignof(u32x4) == 16 && sizeof(f32x4) == 16 && alignof(f32x4) == 16);
static_assert(sizeof(shared_addr) == 4 && sizeof(Global<float>) == sizeof(void*));

KERNEL global_pointers_kernel(const Global<const uint32_t> in, const Global<uint32_t> out) {
  const Global<const uint16_t> halves = in.as<const uint16_t>();
  const Global<const uint32_t> converted = out;  // Global<T> becomes Global<const T>
  store_global(out, load_global(in + 3));
  store_global(out + 1, load_global(in + 7 - 2));
  store_global(out + 2, static_cast<uint32_t>(load_global(halves + 5)));
  store_global(out + 3, static_cast<uint32_t>(static_cast<bool>(in)));
  store_global(out + 4, static_cast<uint32_t>(static_cast<bool>(Global<float>())));
  store_global(out + 5, static_cast<uint32_t>(device::detail::address_of(converted) == device::detail::address_of(out)));
}

CASE(types, "bf16 fp16 u32x2 u32x4 f32x4 shared_addr Global SwizzleSpan") {
  const auto words = generate<uint32_t>(8, [](size_t i) { return mix(static_cast<uint32_t>(i)); });
  const auto in = run.input(words);
  const auto out = run.output<uint32_t>(6);
  run.launch<global_pointers_kernel>({{1}, 1}, in, out);
  run.expect(out, {words[3], words[5], words[2] >> 16, 1u, 0u, 1u}, "Global");
}

// Tiles of 64 rows, one span wide: chunk c of row r at c ^ (r mod span / 16), and every byte somewhere.
CASE(swizzled, "swizzled SwizzleSpan") {
  for (const auto span : {SwizzleSpan::none, SwizzleSpan::bytes32, SwizzleSpan::bytes64, SwizzleSpan::bytes128}) {
    const uint32_t width = span == SwizzleSpan::none ? 16 : static_cast<uint32_t>(span), chunks = width / 16;
    std::vector<uint32_t> got, want;
    for (uint32_t row = 0; row < 64; ++row)
      for (uint32_t byte = 0; byte < width; ++byte) {
        got.push_back(swizzled(4096 + row * width + byte, span));
        // The pattern is one of 128-byte lines: narrower rows share a line and a factor.
        const uint32_t factor = row * width / 128 % chunks;
        want.push_back(4096 + row * width + ((byte / 16 ^ factor) * 16 + byte % 16));
      }
    run.expect(got, want, "span " + std::to_string(static_cast<int>(span)));
  }
}

// The bit fields of PTX ISA, "Matrix Descriptor".
CASE(matrix_descriptor, "matrix_descriptor") {
  const uint64_t got = matrix_descriptor(0x12340, 0x2560, 0x3890, SwizzleSpan::bytes64);
  run.expect(std::vector<uint64_t>{got & 0x3fff, got >> 16 & 0x3fff, got >> 32 & 0x3fff, got >> 62, got >> 46 & 0xffff},
             std::vector<uint64_t>{0x1234, 0x256, 0x389, 2, 0}, "fields");
  const auto mode = [](SwizzleSpan span) { return matrix_descriptor(0, 0, 0, span) >> 62; };
  run.expect(std::vector<uint64_t>{mode(SwizzleSpan::none), mode(SwizzleSpan::bytes128), mode(SwizzleSpan::bytes64),
                                   mode(SwizzleSpan::bytes32)},
             std::vector<uint64_t>{0, 1, 2, 3}, "modes");
}
CASE(advanced, "advanced") {  // is the descriptor of an operand that begins further on
  std::vector<uint64_t> got, want;
  for (const uint32_t bytes : {0u, 16u, 32u, 1024u, 10240u, 0x2aff0u}) {
    got.push_back(advanced(matrix_descriptor(0x400, 0x2560, 0x3890, SwizzleSpan::bytes128), bytes));
    want.push_back(matrix_descriptor(0x400 + bytes, 0x2560, 0x3890, SwizzleSpan::bytes128));
  }
  run.expect(got, want, "descriptors");
}

// --- where am I, and launch ---------------------------------------------------------------------------

KERNEL ids_kernel(const Global<int> out) {
  const int block = (block_z() * grid_y() + block_y()) * grid_x() + block_x();
  const int ids[] = {thread_id(), lane_id(), warp_id(), block_size(), block_x(),
                     block_y(),   block_z(), grid_x(),  grid_y(),     grid_z()};
  UNROLL for (int i = 0; i < 10; ++i) store_global(out + (block * block_size() + thread_id()) * 10 + i, ids[i]);
}

CASE(ids, "thread_id lane_id warp_id block_size block_x block_y block_z grid_x grid_y grid_z launch LaunchShape") {
  for (const int threads : {1, 32, 33, 96, 1024}) {
    constexpr int x = 3, y = 4, z = 2;
    std::vector<int> want;
    for (int bz = 0; bz < z; ++bz)
      for (int by = 0; by < y; ++by)
        for (int bx = 0; bx < x; ++bx)
          for (int t = 0; t < threads; ++t)
            want.insert(want.end(), {t, t % 32, t / 32, threads, bx, by, bz, x, y, z});
    const auto out = run.output<int>(want.size());
    run.launch<ids_kernel>({{x, y, z}, threads}, out);
    run.expect(out, want, std::to_string(threads) + " threads");
  }
}

KERNEL fill_shared_kernel(const Global<uint32_t> out, const int words) {
  const shared_addr base = shared_base();
  for (int i = thread_id(); i < words; i += block_size()) store_shared<uint32_t>(base + 4 * i, i ^ 0x1234);
  cta_sync();
  uint32_t sum = 0;
  for (int i = thread_id(); i < words; i += block_size()) sum += load_shared<uint32_t>(base + 4 * (words - 1 - i));
  store_global(out + thread_id(), sum);
  if (thread_id() == 0) store_global(out + block_size(), base % 1024);
}

// As much shared memory as a block may ask for; one byte more is refused.
CASE(dynamic_shared_memory, "launch shared_base current_card Card") {
  require(run.card().multiprocessors > 0 && run.card().shared_bytes_per_block > 48 * 1024, "the card says too little");
  for (const int bytes : {1024, 48 * 1024, 48 * 1024 + 16, run.card().shared_bytes_per_block}) {
    const int words = bytes / 4;
    const auto out = run.output<uint32_t>(129);
    run.launch<fill_shared_kernel>({{1}, 128, static_cast<uint32_t>(bytes)}, out, words);
    std::vector<uint32_t> want(129);
    for (int i = 0; i < words; ++i) want[i % 128] += (words - 1 - i) ^ 0x1234;
    run.expect(out, want, std::to_string(bytes) + " bytes");
  }
}

CASE(refused_launches, "launch error_string LaunchShape") {
  const auto out = run.output<uint32_t>(1);
  const auto too_much = static_cast<uint32_t>(run.card().shared_bytes_per_block) + 1024;
  const LaunchShape shapes[] = {
      {{1}, 32, too_much},
      {{1}, 1025, 1024},
      {{1}, 0, 1024},
      {{0}, 32, 1024},
      {{1u << 20}, 1024, 1024, true},  // more blocks than fit on the card cannot all run at once
  };
  for (const LaunchShape& shape : shapes)
    require(run.refuses([&] { return device::launch<fill_shared_kernel>(shape, nullptr, out, 0); }),
            "launched: " + std::to_string(shape.grid.x) + " blocks of " + std::to_string(shape.threads) + " threads");
  require(error_string(0) != nullptr, "success without a text");
}

// --- barriers -----------------------------------------------------------------------------------------

// Rounds of: write, wait, read what the opposite thread of the group wrote. A second barrier in each
// keeps the next round's writes behind this one's reads.
template <class Wait>
DEVICE uint32_t exchange(shared_addr words, int index, int count, int rounds, Wait wait) {
  uint32_t value = index * 2654435761u + 1;
  for (int round = 0; round < rounds; ++round) {
    store_shared<uint32_t>(words + 4 * index, value);
    wait(round);
    value = value * 31 + load_shared<uint32_t>(words + 4 * (count - 1 - index));
    wait(round);
  }
  return value;
}

std::vector<uint32_t> exchanged(int count, int rounds) {
  auto values = generate<uint32_t>(count, [](size_t i) { return static_cast<uint32_t>(i) * 2654435761u + 1; });
  for (int round = 0; round < rounds; ++round) {
    const auto before = values;
    for (int i = 0; i < count; ++i) values[i] = before[i] * 31 + before[count - 1 - i];
  }
  return values;
}

KERNEL cta_sync_kernel(const Global<uint32_t> out) {
  const uint32_t value = exchange(shared_base(), thread_id(), block_size(), 5, [](int) { cta_sync(); });
  store_global(out + thread_id(), value);
}

CASE(cta_sync, "cta_sync") {
  for (const int threads : {32, 40, 256, 1024}) {
    const auto out = run.output<uint32_t>(threads);
    run.launch<cta_sync_kernel>({{1}, threads, 4096}, out);
    run.expect(out, exchanged(threads, 5), std::to_string(threads) + " threads");
  }
}

// Three groups of two warps, each at its own barrier; in turn they use all fifteen.
KERNEL bar_sync_kernel(const Global<uint32_t> out) {
  const int group = thread_id() / 64, index = thread_id() % 64;
  const uint32_t value = exchange(shared_base() + 256 * group, index, 64, 5,
                                  [&](int round) { bar_sync(1 + group + 3 * round, 64); });
  store_global(out + thread_id(), value);
}

CASE(bar_sync, "bar_sync") {
  const auto out = run.output<uint32_t>(192);
  run.launch<bar_sync_kernel>({{1}, 192, 768}, out);
  std::vector<uint32_t> want;
  for (int group = 0; group < 3; ++group)
    for (const uint32_t value : exchanged(64, 5)) want.push_back(value);
  run.expect(out, want, "groups");
}

// One warp writes and does not wait; two warps read. The way back is a second barrier.
KERNEL bar_arrive_kernel(const Global<uint32_t> out) {
  const shared_addr word = shared_base() + 4 * lane_id();
  for (int round = 0; round < 4; ++round) {
    if (warp_id() == 0) {
      if (round > 0) bar_sync(2, 96);
      store_shared<uint32_t>(word, 100 * round + lane_id());
      bar_arrive(1, 96);
    } else {
      bar_sync(1, 96);
      const uint32_t value = load_shared<uint32_t>(shared_base() + 4 * (31 - lane_id()));
      store_global(out + 64 * round + thread_id() - 32, value);
      if (round < 3) bar_arrive(2, 96);
    }
  }
}

CASE(bar_arrive, "bar_arrive bar_sync") {
  const auto out = run.output<uint32_t>(256);
  run.launch<bar_arrive_kernel>({{1}, 96, 128}, out);
  run.expect(out, generate<uint32_t>(256, [](size_t i) { return static_cast<uint32_t>(100 * (i / 64) + 31 - i % 32); }),
             "handed over");
}

KERNEL warp_sync_kernel(const Global<uint32_t> out) {
  const shared_addr words = shared_base() + 128 * warp_id();
  uint32_t value = exchange(words, lane_id(), 32, 3, [](int) { warp_sync(); });
  store_global(out + thread_id(), value);
  warp_sync();
  if (lane_id() < 16) {  // half a warp alone
    value = exchange(words, lane_id(), 16, 3, [](int) { warp_sync(0xffff); });
    store_global(out + 64 + 16 * warp_id() + lane_id(), value);
  }
}

CASE(warp_sync, "warp_sync") {
  const auto out = run.output<uint32_t>(96);
  run.launch<warp_sync_kernel>({{1}, 64, 256}, out);
  std::vector<uint32_t> want;
  for (const int count : {32, 32, 16, 16})
    for (const uint32_t value : exchanged(count, 3)) want.push_back(value);
  run.expect(out, want, "whole and half warps");
}

// --- between the lanes of a warp ----------------------------------------------------------------------

enum class Shuffle { exclusive_or, down, up, index };

template <Shuffle how, class T> DEVICE T shuffle(T value, int argument, uint32_t mask) {
  if constexpr (how == Shuffle::exclusive_or) return shfl_xor(value, argument, mask);
  else if constexpr (how == Shuffle::down) return shfl_down(value, argument, mask);
  else if constexpr (how == Shuffle::up) return shfl_up(value, argument, mask);
  else return shfl_idx(value, argument, mask);
}

// By 0, 1, 2, … 15, of float, int and uint32_t, which move the same bits; then within half a warp.
template <Shuffle how> KERNEL shuffle_kernel(const Global<uint32_t> out) {
  const int lane = lane_id();
  for (int by = 0; by < 16; ++by) {
    const Global<uint32_t> row = out + (by * 32 + lane) * 3;
    store_global(row, shuffle<how>(static_cast<uint32_t>(1000 + lane), by, ~0u));
    store_global(row + 1, static_cast<uint32_t>(shuffle<how>(-lane, by, ~0u)));
    store_global(row + 2, static_cast<uint32_t>(shuffle<how>(0.5f * lane, by, ~0u) * 2));
  }
  if (lane < 16 && how != Shuffle::down)  // there it would read the other half
    store_global(out + 16 * 32 * 3 + lane, shuffle<how>(static_cast<uint32_t>(lane), 8, 0xffffu));
}

template <Shuffle how> void check_shuffle(Run& run) {
  const auto from = [](int lane, int by) {
    const int source = how == Shuffle::exclusive_or ? lane ^ by
                       : how == Shuffle::down       ? lane + by
                       : how == Shuffle::up         ? lane - by
                                                    : by;
    return source < 0 || source > 31 ? lane : source;
  };
  std::vector<uint32_t> want;
  for (int by = 0; by < 16; ++by)
    for (int lane = 0; lane < 32; ++lane)
      for (const int value : {1000 + from(lane, by), -from(lane, by), from(lane, by)})
        want.push_back(static_cast<uint32_t>(value));
  if (how != Shuffle::down)
    for (int lane = 0; lane < 16; ++lane) want.push_back(from(lane, 8));
  const auto out = run.output<uint32_t>(want.size());
  run.launch<shuffle_kernel<how>>({{1}, 32}, out);
  run.expect(out, want, "lanes");
}

CASE(shfl_xor, "shfl_xor") { check_shuffle<Shuffle::exclusive_or>(run); }
CASE(shfl_down, "shfl_down") { check_shuffle<Shuffle::down>(run); }
CASE(shfl_up, "shfl_up") { check_shuffle<Shuffle::up>(run); }
CASE(shfl_idx, "shfl_idx") { check_shuffle<Shuffle::index>(run); }

KERNEL ballot_kernel(const Global<uint32_t> out) {
  const int lane = lane_id();
  store_global(out + thread_id(), ballot(thread_id() % 3 == 1));
  if (lane % 2 == 0) store_global(out + 64 + thread_id() / 2, ballot(lane % 4 == 0, 0x55555555u));
}

CASE(ballot, "ballot") {
  std::vector<uint32_t> want;
  for (uint32_t t = 0; t < 64; ++t) {
    uint32_t votes = 0;
    for (uint32_t lane = 0; lane < 32; ++lane) votes |= static_cast<uint32_t>((t / 32 * 32 + lane) % 3 == 1) << lane;
    want.push_back(votes);
  }
  want.insert(want.end(), 32, 0x11111111u);
  const auto out = run.output<uint32_t>(96);
  run.launch<ballot_kernel>({{1}, 64}, out);
  run.expect(out, want, "votes");
}

}  // namespace
}  // namespace almostgpt::conformance
