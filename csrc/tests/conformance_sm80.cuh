// Cases: tensor cores and asynchronous copies as of sm_80.
#pragma once

#include "tests/conformance.h"

namespace almostgpt::conformance {
namespace {

// --- ldmatrix -----------------------------------------------------------------------------------------

// 32 rows of 8 elements, element e of row r being 8 r + e, in an order of their own in shared memory.
template <bool transposed> KERNEL ldmatrix_kernel(const Global<uint32_t> out) {
  const int lane = lane_id();
  const shared_addr row = shared_base() + 16 * (lane * 13 % 32);
  for (int e = 0; e < 8; ++e) store_shared(row + 2 * e, static_cast<uint16_t>(8 * lane + e));
  warp_sync();
  uint32_t r[4];
  if (transposed) ldmatrix_x4_trans(r, row);
  else ldmatrix_x4(r, row);
  UNROLL for (int j = 0; j < 4; ++j) store_global(out + 4 * lane + j, r[j]);
}

template <bool transposed> void check_ldmatrix(Run& run) {
  std::vector<uint32_t> want;
  for (uint32_t lane = 0; lane < 32; ++lane)
    for (uint32_t j = 0; j < 4; ++j) {
      const uint32_t g = lane / 4, t = lane % 4;
      const auto element = [&](uint32_t row, uint32_t column) { return 64 * j + 8 * row + column; };
      const uint32_t lo = transposed ? element(2 * t, g) : element(g, 2 * t);
      const uint32_t hi = transposed ? element(2 * t + 1, g) : element(g, 2 * t + 1);
      want.push_back(lo | hi << 16);
    }
  const auto out = run.output<uint32_t>(128);
  run.launch<ldmatrix_kernel<transposed>>({{1}, 32, 512}, out);
  run.expect(out, want, "registers");
}

CASE(ldmatrix_x4, "ldmatrix_x4") { check_ldmatrix<false>(run); }
CASE(ldmatrix_x4_trans, "ldmatrix_x4_trans") { check_ldmatrix<true>(run); }

// --- mma ----------------------------------------------------------------------------------------------

// The fragments as mma_m16n8k16 describes them, from A [16][16] and B [8][16]; each warp its own product.
template <class T>
KERNEL mma_kernel(const Global<const T> a_all, const Global<const T> b_all, const Global<float> out) {
  const int lane = lane_id(), g = lane / 4, t = lane % 4;
  const Global<const T> a = a_all + 256 * warp_id(), b = b_all + 128 * warp_id();
  uint32_t fragment[4];
  UNROLL for (int i = 0; i < 4; ++i)
    fragment[i] = load_global_as<uint32_t>(a + (g + 8 * (i % 2)) * 16 + 2 * t + 8 * (i / 2));
  const uint32_t b0 = load_global_as<uint32_t>(b + g * 16 + 2 * t);
  const uint32_t b1 = load_global_as<uint32_t>(b + g * 16 + 2 * t + 8);
  float d[4];
  UNROLL for (int i = 0; i < 4; ++i) d[i] = static_cast<float>(4 * lane + i);
  mma_m16n8k16<T>(d, fragment, b0, b1);
  mma_m16n8k16<T>(d, fragment, b0, b1);  // adds
  UNROLL for (int i = 0; i < 4; ++i) store_global(out + 4 * thread_id() + i, d[i]);
}

template <class T> void check_mma(Run& run) {
  constexpr int warps = 4;
  const auto a = [](int warp, int m, int k) { return small(warp * 1000 + m * 16 + k, 9); };
  const auto b = [](int warp, int k, int n) { return small(77777 + warp * 1000 + n * 16 + k, 9); };
  std::vector<uint16_t> a_bits, b_bits;
  std::vector<float> want;
  for (int warp = 0; warp < warps; ++warp) {
    for (int i = 0; i < 256; ++i) a_bits.push_back(kFormat<T>.of(a(warp, i / 16, i % 16)));
    for (int i = 0; i < 128; ++i) b_bits.push_back(kFormat<T>.of(b(warp, i % 16, i / 16)));
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i) {
        int sum = 4 * lane + i;
        for (int k = 0; k < 16; ++k)
          sum += 2 * a(warp, lane / 4 + 8 * (i / 2), k) * b(warp, k, 2 * (lane % 4) + i % 2);
        want.push_back(static_cast<float>(sum));
      }
  }
  const auto in_a = run.input(a_bits), in_b = run.input(b_bits);
  const auto out = run.output<float>(want.size());
  run.launch<mma_kernel<T>>({{1}, 32 * warps}, in_a.template as<const T>(), in_b.template as<const T>(), out);
  run.expect(out, want, "registers");
}

CASE(mma_bf16, "mma_m16n8k16") { check_mma<bf16>(run); }
CASE(mma_fp16, "mma_m16n8k16") { check_mma<fp16>(run); }

// --- cp.async -----------------------------------------------------------------------------------------

constexpr int kChunks = 64;  // of 16 bytes, one a thread

// Three groups, waited for one by one; each is read once it is there, the later ones still under way.
// Of the second one only every third chunk is valid: the rest becomes zeros and is not read, be it far
// outside the buffer.
KERNEL cp_async_kernel(const Global<const uint32_t> in, const Global<uint32_t> out) {
  const int t = thread_id();
  const shared_addr mine = shared_base() + 16 * t, others = shared_base() + 16 * (kChunks - 1 - t);
  constexpr uint32_t group = 16 * kChunks;
  store_shared(mine + group, u32x4{~0u, ~0u, ~0u, ~0u});

  cp_async16(mine, in + 4 * t);
  cp_async_commit();
  cp_async16(mine + group, in + (t % 3 == 0 ? 4 * (kChunks + t) : 1 << 20), t % 3 == 0);
  cp_async_commit();
  cp_async16(mine + 2 * group, in + 4 * (2 * kChunks + t));
  cp_async_commit();

  cp_async_wait<2>();
  cta_sync();
  store_global_as<u32x4>(out + 4 * t, load_shared<u32x4>(others));
  cp_async_wait<1>();
  cta_sync();
  store_global_as<u32x4>(out + 4 * (kChunks + t), load_shared<u32x4>(others + group));
  cp_async_wait<0>();
  cta_sync();
  store_global_as<u32x4>(out + 4 * (2 * kChunks + t), load_shared<u32x4>(others + 2 * group));
}

CASE(cp_async, "cp_async16 cp_async_commit cp_async_wait") {
  const auto words = generate<uint32_t>(3 * 4 * kChunks, [](size_t i) { return mix(static_cast<uint32_t>(i)) | 1; });
  std::vector<uint32_t> want;
  for (int group = 0; group < 3; ++group)
    for (int t = 0; t < kChunks; ++t) {
      const int chunk = kChunks - 1 - t;
      for (int i = 0; i < 4; ++i)
        want.push_back(group == 1 && chunk % 3 != 0 ? 0 : words[4 * (group * kChunks + chunk) + i]);
    }
  const auto in = run.input(words);
  const auto out = run.output<uint32_t>(want.size());
  run.launch<cp_async_kernel>({{1}, kChunks, 3 * 16 * kChunks}, in, out);
  run.expect(out, want, "groups");
}

// One word a thread, every third of the second group not valid.
KERNEL cp_async4_kernel(const Global<const uint32_t> in, const Global<uint32_t> out) {
  const int t = thread_id();
  const shared_addr mine = shared_base() + 4 * t, others = shared_base() + 4 * (kChunks - 1 - t);
  store_shared(mine + 4 * kChunks, ~0u);
  cp_async4(mine, in + t);
  cp_async_commit();
  cp_async4(mine + 4 * kChunks, in + (t % 3 == 0 ? kChunks + t : 1 << 20), t % 3 == 0);
  cp_async_commit();
  cp_async_wait<1>();
  cta_sync();
  store_global(out + t, load_shared<uint32_t>(others));
  cp_async_wait<0>();
  cta_sync();
  store_global(out + kChunks + t, load_shared<uint32_t>(others + 4 * kChunks));
}

CASE(cp_async4, "cp_async4 cp_async_commit cp_async_wait") {
  const auto words = generate<uint32_t>(2 * kChunks, [](size_t i) { return mix(static_cast<uint32_t>(i)) | 1; });
  std::vector<uint32_t> want;
  for (int i = 0; i < 2 * kChunks; ++i) {
    const int from = kChunks - 1 - i % kChunks;
    want.push_back(i < kChunks || from % 3 == 0 ? words[i / kChunks * kChunks + from] : 0);
  }
  const auto in = run.input(words);
  const auto out = run.output<uint32_t>(want.size());
  run.launch<cp_async4_kernel>({{1}, kChunks, 2 * 4 * kChunks}, in, out);
  run.expect(out, want, "groups");
}

}  // namespace
}  // namespace almostgpt::conformance
