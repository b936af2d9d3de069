// Cases of Hopper: mbarriers, TMA, elect_one, setmaxnreg. Linking this file adds them to conformance.cu.
#include "tests/conformance.h"

namespace almostgpt::conformance {
namespace {

// --- elect_one, setmaxnreg ----------------------------------------------------------------------------

KERNEL elect_one_kernel(const Global<uint32_t> out) {
  const uint32_t elected = ballot(elect_one());
  store_global(out + thread_id(), elected);
}

CASE_SM90(elect_one, "elect_one") {
  const auto out = run.output<uint32_t>(64);
  run.launch<elect_one_kernel>({{1}, 64}, out);
  const std::vector<uint32_t> got = out.read();
  for (const uint32_t elected : got) {
    require(elected != 0 && (elected & (elected - 1)) == 0, "not one lane of the warp");
    require(elected == got[0], "another lane in another warp");
  }
  run.record(got);
}

// Each of 168 · 384 registers changes hands: 24 + 2 · 240 = 3 · 168.
KERNEL LAUNCH_BOUNDS(384, 1) setmaxnreg_kernel(const Global<const float> in, const Global<float> out) {
  if (warp_id() < 4) {
    setmaxnreg_dec<24>();
    store_global(out + thread_id(), load_global(in + thread_id()));
  } else {
    setmaxnreg_inc<240>();
    float values[128];
    UNROLL for (int i = 0; i < 128; ++i) values[i] = load_global(in + (thread_id() + i) % 384);
    keep_registers(values);
    float sum = 0;
    UNROLL for (int i = 0; i < 128; ++i) sum += values[i];
    store_global(out + thread_id(), sum);
  }
}

CASE_SM90(setmaxnreg, "setmaxnreg_dec setmaxnreg_inc keep_registers") {
  const auto x = generate<float>(384, [](size_t i) { return static_cast<float>(small(i, 100)); });
  std::vector<float> want(x);
  for (int t = 128; t < 384; ++t) {
    want[t] = 0;
    for (int i = 0; i < 128; ++i) want[t] += x[(t + i) % 384];
  }
  const auto in = run.input(x);
  const auto out = run.output<float>(384);
  run.launch<setmaxnreg_kernel>({{1}, 384}, in, out);
  run.expect(out, want, "sums");
}

// --- mbarriers ----------------------------------------------------------------------------------------

// One thread alone sees each state: bit by bit, what mbar_try_wait answers.
KERNEL mbar_states_kernel(const Global<uint32_t> out) {
  const shared_addr barrier = shared_base();
  mbar_init(barrier, 2);
  uint32_t states = 0;
  const auto see = [&] {
    for (int parity = 1; parity >= 0; --parity)
      states = states << 1 | static_cast<uint32_t>(mbar_try_wait(barrier, parity));
  };
  see();  // before the first phase, that of parity 1 counts as complete: 10
  mbar_arrive(barrier);
  see();  // one of two: 10
  mbar_arrive(barrier);
  see();  // phase 0 is complete: 01
  mbar_arrive_expect_tx(barrier, 0);
  mbar_arrive(barrier);
  see();  // phase 1: 10
  store_global(out, states);
}

CASE_SM90(mbar_states, "mbar_init mbar_arrive mbar_arrive_expect_tx mbar_try_wait") {
  const auto out = run.output<uint32_t>(1);
  run.launch<mbar_states_kernel>({{1}, 1, 16}, out);
  run.expect(out, {0b10100110u}, "states");
}

// Rounds in which every warp writes, arrives once, and reads what the next warp wrote. Two barriers, so
// that a slow reader is waited for as well.
KERNEL mbar_phases_kernel(const Global<uint32_t> out) {
  const int warps = block_size() / 32, next = (warp_id() + 1) % warps;
  const shared_addr written = shared_base(), read = written + 8, words = written + 16;
  if (thread_id() == 0) {
    mbar_init(written, warps);
    mbar_init(read, block_size());  // here each thread arrives
  }
  cta_sync();
  uint32_t value = thread_id();
  for (uint32_t round = 0; round < 6; ++round) {
    store_shared<uint32_t>(words + 4 * thread_id(), value);
    warp_sync();
    if (lane_id() == 0) mbar_arrive(written);
    mbar_wait(written, round & 1);
    value = 5 * value + load_shared<uint32_t>(words + 4 * (32 * next + lane_id()));
    mbar_arrive(read);
    mbar_wait(read, round & 1);
  }
  store_global(out + thread_id(), value);
}

CASE_SM90(mbar_phases, "mbar_init mbar_arrive mbar_wait") {
  constexpr int n = 128;
  auto values = generate<uint32_t>(n, [](size_t i) { return static_cast<uint32_t>(i); });
  for (int round = 0; round < 6; ++round) {
    const auto before = values;
    for (int i = 0; i < n; ++i) values[i] = 5 * before[i] + before[(i + 32) % n];
  }
  const auto out = run.output<uint32_t>(n);
  run.launch<mbar_phases_kernel>({{1}, n, 16 + 4 * n}, out);
  run.expect(out, values, "values");
}

// --- tensors and boxes, on the host -------------------------------------------------------------------

struct Coordinates { int c[5]; };

// A tensor of numbered elements, rows padded so that a stride is a multiple of 16 bytes, and a box in it.
template <class T> struct Tensor {
  int rank;
  SwizzleSpan span;
  uint64_t dims[5] = {37, 11, 5, 4, 3};
  uint32_t box[5] = {24, 6, 3, 2, 2};
  uint64_t pitch = 40;  // elements from row to row

  Tensor(int rank, SwizzleSpan span) : rank(rank), span(span) {
    // A swizzled box is as wide as the span.
    if (span != SwizzleSpan::none) box[0] = static_cast<uint32_t>(span) / sizeof(T);
  }
  uint64_t stride(int d) const {  // in elements
    uint64_t elements = 1;
    for (int i = 0; i < d; ++i) elements *= i == 0 ? pitch : dims[i];
    return elements;
  }
  size_t size() const { return stride(rank); }
  uint32_t box_elements() const {
    uint32_t elements = 1;
    for (int d = 0; d < rank; ++d) elements *= box[d];
    return elements;
  }
  uint32_t box_bytes() const { return box_elements() * sizeof(T); }
  TensorMap map(const void* base) const {
    uint64_t strides[4];
    for (int d = 1; d < rank; ++d) strides[d - 1] = stride(d) * sizeof(T);
    TensorMap map;
    require_success(make_tensor_map<T>(&map, base, rank, dims, strides, box, span), "make_tensor_map");
    return map;
  }
  // Calls visit(place in shared memory, place in the tensor or -1), in elements, for all of the box.
  template <class Visit> void for_each(const Coordinates& at, Visit visit) const {
    for (uint32_t i = 0; i < box_elements(); ++i) {
      int64_t place = 0;
      uint32_t rest = i;
      for (int d = 0; d < rank; ++d) {
        const int64_t x = at.c[d] + static_cast<int64_t>(rest % box[d]);
        rest /= box[d];
        if (x < 0 || x >= static_cast<int64_t>(dims[d])) place = -1;
        if (place >= 0) place += x * static_cast<int64_t>(stride(d));
      }
      visit(swizzled(i * sizeof(T), span) / sizeof(T), place);
    }
  }
  // Inside; over the lower and the upper edge of each dimension and of all; wholly outside.
  std::vector<Coordinates> places() const {
    std::vector<Coordinates> all = {
        {{3, 2, 1, 1, 1}}, {{-5, -3, -2, -1, -1}}, {{30, 8, 3, 3, 2}}, {{1000, 0, 0, 0, 0}}};
    for (int d = 0; d < rank; ++d)
      for (const int x : {-1, static_cast<int>(dims[d]) - 1}) {
        Coordinates one = all[0];
        one.c[d] = x;
        all.push_back(one);
      }
    return all;
  }
};

template <class T> using Bits = std::conditional_t<std::is_same_v<T, float>, float, uint16_t>;

template <class T> std::vector<Bits<T>> numbered(size_t size, int first) {
  return generate<Bits<T>>(size, [&](size_t i) { return static_cast<Bits<T>>(first + i); });
}

constexpr SwizzleSpan kSpans[] = {SwizzleSpan::none, SwizzleSpan::bytes32, SwizzleSpan::bytes64,
                                  SwizzleSpan::bytes128};

// --- loads --------------------------------------------------------------------------------------------

// The box, byte for byte as it came to lie in shared memory; the barrier lies behind it.
template <int rank>
KERNEL tma_load_kernel(GRID_CONSTANT const TensorMap map, GRID_CONSTANT const Coordinates at, const int bytes,
                       const Global<uint32_t> out) {
  const shared_addr box = shared_base(), barrier = box + bytes;
  if (thread_id() == 0) {
    prefetch_tensor_map(&map);
    mbar_init(barrier, 1);
    fence_mbarrier_init();
  }
  cta_sync();
  if (thread_id() == 0) {
    mbar_arrive_expect_tx(barrier, bytes);
    const auto& c = at.c;
    if constexpr (rank == 2) tma_load(box, &map, barrier, c[0], c[1]);
    else if constexpr (rank == 3) tma_load(box, &map, barrier, c[0], c[1], c[2]);
    else if constexpr (rank == 4) tma_load(box, &map, barrier, c[0], c[1], c[2], c[3]);
    else tma_load(box, &map, barrier, c[0], c[1], c[2], c[3], c[4]);
  }
  mbar_wait(barrier, 0);
  for (int i = thread_id(); i < bytes / 4; i += block_size())
    store_global(out + i, load_shared<uint32_t>(box + 4 * i));
}

template <class T, int rank> void check_load(Run& run) {
  for (const SwizzleSpan span : kSpans) {
    const Tensor<T> tensor(rank, span);
    const auto values = numbered<T>(tensor.size(), 1);  // the padding, too, is not zero
    const auto in = run.input(values);
    for (const Coordinates& at : tensor.places()) {
      std::vector<Bits<T>> want(tensor.box_elements());
      tensor.for_each(at, [&](size_t shared, int64_t place) { want[shared] = place < 0 ? 0 : values[place]; });
      const auto out = run.output<Bits<T>>(want.size());
      run.launch<tma_load_kernel<rank>>({{1}, 64, tensor.box_bytes() + 16}, tensor.map(in.address()), at,
                                        static_cast<int>(tensor.box_bytes()), out.template as<uint32_t>());
      run.expect(out, want, "span " + std::to_string(static_cast<int>(span)) + " at " + std::to_string(at.c[0]) + " " +
                                std::to_string(at.c[1]));
    }
  }
}

#define TMA_LOAD_PRIMITIVES                                                                             \
  "tma_load make_tensor_map TensorMap prefetch_tensor_map fence_mbarrier_init mbar_arrive_expect_tx " \
  "mbar_wait SwizzleSpan"
CASE_SM90(tma_load_2d, TMA_LOAD_PRIMITIVES) { check_load<bf16, 2>(run); }
CASE_SM90(tma_load_3d, TMA_LOAD_PRIMITIVES) { check_load<bf16, 3>(run); }
CASE_SM90(tma_load_4d, TMA_LOAD_PRIMITIVES) { check_load<bf16, 4>(run); }
CASE_SM90(tma_load_5d, TMA_LOAD_PRIMITIVES) { check_load<bf16, 5>(run); }
CASE_SM90(tma_load_fp16, TMA_LOAD_PRIMITIVES) { check_load<fp16, 2>(run); }
CASE_SM90(tma_load_float, TMA_LOAD_PRIMITIVES) { check_load<float, 3>(run); }

// Two loads and two arrivals, each with its bytes, for one phase; then again in the next.
KERNEL tma_load_pair_kernel(GRID_CONSTANT const TensorMap map, const int bytes, const Global<uint32_t> out) {
  constexpr uint32_t pitch = 128;  // what TMA aligns boxes to
  const shared_addr boxes = shared_base(), barrier = boxes + 2 * pitch, box = boxes + warp_id() * pitch;
  if (thread_id() == 0) {
    mbar_init(barrier, 2);
    fence_mbarrier_init();
  }
  cta_sync();
  for (int phase = 0; phase < 2; ++phase) {
    if (lane_id() == 0) {
      mbar_arrive_expect_tx(barrier, bytes);
      tma_load(box, &map, barrier, 0, 2 * phase + warp_id());
    }
    mbar_wait(barrier, phase);
    // What the other warp's load brought.
    const shared_addr other = boxes + (1 - warp_id()) * pitch;
    const Global<uint32_t> row = out + (2 * phase + 1 - warp_id()) * (bytes / 4);
    for (int i = lane_id(); i < bytes / 4; i += 32) store_global(row + i, load_shared<uint32_t>(other + 4 * i));
    // Before TMA writes again where these threads have read.
    fence_proxy_async();
    cta_sync();
  }
}

CASE_SM90(mbar_bytes, "mbar_arrive_expect_tx mbar_wait tma_load fence_proxy_async") {
  Tensor<bf16> tensor(2, SwizzleSpan::none);
  tensor.box[0] = 40;
  tensor.dims[0] = 40;
  tensor.box[1] = 1;
  const auto values = numbered<bf16>(tensor.size(), 1);
  const auto in = run.input(values);
  const auto out = run.output<uint16_t>(4 * 40);
  run.launch<tma_load_pair_kernel>({{1}, 64, 2 * 128 + 16}, tensor.map(in.address()), 80, out.as<uint32_t>());
  run.expect(out, {values.begin(), values.begin() + 4 * 40}, "four rows");
}

// --- stores -------------------------------------------------------------------------------------------

template <int rank, bool add>
KERNEL tma_store_kernel(GRID_CONSTANT const TensorMap map, GRID_CONSTANT const Coordinates at, const int bytes,
                        const Global<const uint32_t> in) {
  const shared_addr box = shared_base();
  for (int i = thread_id(); i < bytes / 4; i += block_size()) store_shared(box + 4 * i, load_global(in + i));
  fence_proxy_async();
  cta_sync();
  if (thread_id() != 0) return;
  const auto& c = at.c;
  if constexpr (add) {
    if constexpr (rank == 2) tma_reduce_add(&map, box, c[0], c[1]);
    else if constexpr (rank == 3) tma_reduce_add(&map, box, c[0], c[1], c[2]);
    else tma_reduce_add(&map, box, c[0], c[1], c[2], c[3]);
  } else {
    if constexpr (rank == 2) tma_store(&map, box, c[0], c[1]);
    else if constexpr (rank == 3) tma_store(&map, box, c[0], c[1], c[2]);
    else if constexpr (rank == 4) tma_store(&map, box, c[0], c[1], c[2], c[3]);
    else tma_store(&map, box, c[0], c[1], c[2], c[3], c[4]);
  }
  tma_commit();
  tma_wait<0>();
}

// All that lies in the tensor is written, and nothing else. Two blocks add the same.
template <class T, int rank, bool add> void check_store(Run& run) {
  constexpr unsigned blocks = add ? 2 : 1;
  for (const SwizzleSpan span : kSpans) {
    const Tensor<T> tensor(rank, span);
    const auto values = numbered<T>(tensor.box_elements(), 1);
    const auto in = run.input(values);
    for (const Coordinates& at : tensor.places()) {
      const auto out = add ? run.input_output(numbered<T>(tensor.size(), 5)) : run.output<Bits<T>>(tensor.size());
      std::vector<Bits<T>> want = out.read();
      tensor.for_each(at, [&](size_t shared, int64_t place) {
        if (place >= 0) want[place] = add ? want[place] + blocks * values[shared] : values[shared];
      });
      run.launch<tma_store_kernel<rank, add>>({{blocks}, 64, tensor.box_bytes()}, tensor.map(out.address()), at,
                                              static_cast<int>(tensor.box_bytes()), in.template as<const uint32_t>());
      run.expect(out, want, "span " + std::to_string(static_cast<int>(span)) + " at " + std::to_string(at.c[0]) + " " +
                                std::to_string(at.c[1]));
    }
  }
}

#define TMA_STORE_PRIMITIVES "tma_store tma_commit tma_wait fence_proxy_async make_tensor_map TensorMap"
CASE_SM90(tma_store_2d, TMA_STORE_PRIMITIVES) { check_store<bf16, 2, false>(run); }
CASE_SM90(tma_store_3d, TMA_STORE_PRIMITIVES) { check_store<bf16, 3, false>(run); }
CASE_SM90(tma_store_4d, TMA_STORE_PRIMITIVES) { check_store<bf16, 4, false>(run); }
CASE_SM90(tma_store_5d, TMA_STORE_PRIMITIVES) { check_store<bf16, 5, false>(run); }
CASE_SM90(tma_store_fp16, TMA_STORE_PRIMITIVES) { check_store<fp16, 2, false>(run); }
CASE_SM90(tma_store_float, TMA_STORE_PRIMITIVES) { check_store<float, 3, false>(run); }

#define TMA_REDUCE_PRIMITIVES "tma_reduce_add tma_commit tma_wait fence_proxy_async make_tensor_map TensorMap"
CASE_SM90(tma_reduce_add_2d, TMA_REDUCE_PRIMITIVES) { check_store<float, 2, true>(run); }
CASE_SM90(tma_reduce_add_3d, TMA_REDUCE_PRIMITIVES) { check_store<float, 3, true>(run); }
CASE_SM90(tma_reduce_add_4d, TMA_REDUCE_PRIMITIVES) { check_store<float, 4, true>(run); }

// Two buffers take turns, each written again once its store has read it; at the end the thread that
// waited for all of them reads what they wrote.
KERNEL tma_store_ring_kernel(GRID_CONSTANT const TensorMap map, const Global<const float> written,
                             const Global<float> out) {
  const int t = thread_id();
  for (int row = 0; row < 6; ++row) {
    const shared_addr buffer = shared_base() + row % 2 * 128;
    if (t == 0) tma_wait_read<1>();
    cta_sync();
    store_shared<float>(buffer + 4 * t, static_cast<float>(100 * row + t));
    fence_proxy_async();
    cta_sync();
    if (t == 0) {
      tma_store(&map, buffer, 0, row);
      tma_commit();
    }
  }
  if (t != 0) return;
  tma_wait<0>();
  for (int i = 0; i < 6; ++i) store_global(out + i, load_global(written + i * 32 + 2 * i));
}

CASE_SM90(tma_store_ring, "tma_wait_read tma_wait tma_commit tma_store") {
  const auto rows = run.output<float>(6 * 32), out = run.output<float>(6);
  const uint64_t dims[] = {32, 6}, strides[] = {128};
  const uint32_t box[] = {32, 1};
  TensorMap map;
  require_success(make_tensor_map<float>(&map, rows.address(), 2, dims, strides, box, SwizzleSpan::none),
                  "make_tensor_map");
  run.launch<tma_store_ring_kernel>({{1}, 32, 256}, map, rows, out);
  const auto value = [](size_t row, size_t column) { return static_cast<float>(100 * row + column); };
  run.expect(rows, generate<float>(6 * 32, [&](size_t i) { return value(i / 32, i % 32); }), "rows");
  run.expect(out, generate<float>(6, [&](size_t i) { return value(i, 2 * i); }), "read back");
}

KERNEL bulk_reduce_kernel(const Global<float> out, const int count) {
  for (int i = thread_id(); i < count; i += block_size())
    store_shared<float>(shared_base() + 4 * i, static_cast<float>(block_x() + i));
  fence_proxy_async();
  cta_sync();
  if (thread_id() != 0) return;
  bulk_reduce_add_f32(out + 4 * block_x(), shared_base(), 4 * count);
  tma_commit();
  tma_wait_read<0>();
}

CASE_SM90(bulk_reduce_add_f32, "bulk_reduce_add_f32 tma_commit tma_wait_read fence_proxy_async") {
  constexpr int count = 252, blocks = 3;
  std::vector<float> want(count + 4 * blocks, 1);
  const auto out = run.input_output(want);
  for (int block = 0; block < blocks; ++block)
    for (int i = 0; i < count; ++i) want[4 * block + i] += static_cast<float>(block + i);
  run.launch<bulk_reduce_kernel>({{blocks}, 64, 4 * count}, out, count);
  run.expect(out, want, "sums");
}

// --- what make_tensor_map refuses ---------------------------------------------------------------------

CASE_SM90(refused_tensor_maps, "make_tensor_map error_string") {
  const auto in = run.input(numbered<bf16>(64 * 64, 0));
  const uint64_t dims[] = {64, 64}, strides[] = {128}, odd_strides[] = {120};
  const uint32_t box[] = {64, 8}, wide[] = {128, 8}, tall[] = {64, 257}, odd[] = {7, 8};
  TensorMap map;
  const auto encode = [&](const void* base, const uint64_t* strides, const uint32_t* box, SwizzleSpan span) {
    return make_tensor_map<bf16>(&map, base, 2, dims, strides, box, span);
  };
  require_success(encode(in.address(), strides, box, SwizzleSpan::bytes128), "make_tensor_map");
  const auto refused = [&](const void* base, const uint64_t* strides, const uint32_t* box, SwizzleSpan span) {
    return run.refuses([&] { return encode(base, strides, box, span); });
  };
  const uint16_t* base = in.address();
  require(refused(base + 1, strides, box, SwizzleSpan::bytes128), "taken: a base that is not aligned");
  require(refused(base, odd_strides, box, SwizzleSpan::bytes128), "taken: a stride that is no multiple of 16");
  require(refused(base, strides, wide, SwizzleSpan::bytes128), "taken: a box wider than the span");
  require(refused(base, strides, box, SwizzleSpan::bytes64), "taken: a box wider than a span of 64");
  require(refused(base, strides, tall, SwizzleSpan::bytes128), "taken: 257 rows");
  require(refused(base, strides, odd, SwizzleSpan::none), "taken: rows of 14 bytes");
}

}  // namespace
}  // namespace almostgpt::conformance
