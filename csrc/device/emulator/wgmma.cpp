// wgmma: each warp of a warpgroup computes its 16 rows of the 64.
//
// A product reads shared memory when it is issued, or at the latest in the wgmma_wait that covers it.
// Meanwhile its accumulator registers hold kPoison: whoever reads them gets a NaN, and whoever writes
// them is found out.
#include <algorithm>
#include <cstring>

#include "device/emulator/faults.h"
#include "device/emulator/numbers.h"
#include "device/emulator/report.h"
#include "device/emulator/runtime.h"
#include "device/emulator/scheduler.h"
#include "device/emulator/shared_memory.h"

namespace almostgpt::emulator {
namespace {

const Fault fence_fault("wgmma_fence", {"drop"});
const Fault commit_fault("wgmma_commit", {"drop"});
const Fault wait_fault("wgmma_wait", {"drop", "lax"});
const Fault shared_fault("wgmma_ss", {"stride"});
const Fault registers_fault("wgmma_rs", {"stride"});

constexpr uint32_t kPoison = 0x7fc0dead;  // a NaN that no arithmetic gives
constexpr int kStrideShift = 32;
constexpr uint64_t kOffsetMask = 0x3fff;

void require_sm90a(const char* primitive, Location at) {
  const device::Card& card = running->limits.card;
  if (card.major != 9)
    fail("capability", at,
         format("%s needs compute capability 9.0 (sm_90a); the card has %d.%d", primitive, card.major, card.minor));
}

// --- operands in shared memory -----------------------------------------------------------------------------

struct Operand {
  uint32_t start, leading, stride;
  device::SwizzleSpan span;

  explicit Operand(uint64_t descriptor)
      : start((descriptor & kOffsetMask) << 4),
        leading((descriptor >> 16 & kOffsetMask) << 4),
        stride((descriptor >> kStrideShift & kOffsetMask) << 4) {
    constexpr device::SwizzleSpan kSpans[] = {device::SwizzleSpan::none, device::SwizzleSpan::bytes128,
                                              device::SwizzleSpan::bytes64, device::SwizzleSpan::bytes32};
    span = kSpans[descriptor >> 62];
  }

  // Of element (mn, k), mn a row of A or a column of B; elements up to the next multiple of 8 along the
  // major dimension follow it. See matrix_descriptor in types.h.
  uint32_t address(bool mn_major, int mn, int k) const {
    const int row = static_cast<int>(span);
    uint32_t offset;
    if (span == device::SwizzleSpan::none) {
      offset = mn_major ? mn % 8 * 2 + mn / 8 * stride + k % 8 * 16 + k / 8 * leading
                        : mn % 8 * 16 + mn / 8 * stride + k % 8 * 2 + k / 8 * leading;
    } else if (mn_major) {
      const int columns = row / 2;
      offset = mn % columns * 2 + mn / columns * leading + k % 8 * row + k / 8 * stride;
    } else {
      offset = mn % 8 * row + mn / 8 * stride + k * 2;
    }
    return device::swizzled(start + offset, span);
  }
};

uint64_t half_stride(uint64_t descriptor) {
  const uint64_t stride = descriptor >> kStrideShift & kOffsetMask;
  return (descriptor & ~(kOffsetMask << kStrideShift)) | stride / 2 << kStrideShift;
}

float value_of(const WgmmaProduct& product, uint16_t bits) {
  return product.is_fp16 ? fp16_value(bits) : bf16_value(bits);
}

// Eight elements that lie together. With an agent the access is checked.
void read_eight(Block& block, const WgmmaProduct& product, uint32_t address, float (&values)[8], const Actor* agent) {
  if (agent) {
    check_shared_bounds(block, address, 16, "wgmma operand", product.at);
    check_shared_read(block, address, 16, *agent, product.at);
  }
  uint16_t bits[8];
  std::memcpy(bits, block.at(address), 16);
  for (int i = 0; i < 8; ++i) values[i] = value_of(product, bits[i]);
}

void read_operands(Warp& warp, WgmmaProduct& product, const Actor* agent) {
  Block& block = *warp.block;
  float eight[8];
  if (!product.a_in_registers) {
    const Operand a(product.a);
    const int first = warp.id % 4 * 16;
    for (int outer = 0; outer < 16; ++outer)
      for (int half = 0; half < 2; ++half) {
        const uint32_t address = product.a_mn_major ? a.address(true, first + 8 * half, outer)
                                                    : a.address(false, first + outer, 8 * half);
        read_eight(block, product, address, eight, agent);
        for (int i = 0; i < 8; ++i) {
          float& element = product.a_mn_major ? product.A[8 * half + i][outer] : product.A[outer][8 * half + i];
          element = eight[i];
        }
      }
  }
  const Operand b(product.b);
  product.B.resize(16 * product.n);
  if (product.b_mn_major) {
    for (int k = 0; k < 16; ++k)
      for (int n = 0; n < product.n; n += 8) {
        read_eight(block, product, b.address(true, n, k), eight, agent);
        std::copy(eight, eight + 8, &product.B[k * product.n + n]);
      }
  } else {
    for (int n = 0; n < product.n; ++n)
      for (int half = 0; half < 2; ++half) {
        read_eight(block, product, b.address(false, n, 8 * half), eight, agent);
        for (int i = 0; i < 8; ++i) product.B[(8 * half + i) * product.n + n] = eight[i];
      }
  }
}

void take_a_from_registers(WgmmaProduct& product, int lane, const uint32_t* a) {
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + 8 * (i % 2), column = 2 * (lane % 4) + 8 * (i / 2);
    product.A[row][column] = value_of(product, static_cast<uint16_t>(a[i]));
    product.A[row][column + 1] = value_of(product, static_cast<uint16_t>(a[i] >> 16));
  }
}

// --- accumulators ------------------------------------------------------------------------------------------

void poison(WgmmaProduct& product) {
  const int count = product.n / 2;
  product.saved.resize(32 * count);
  product.poisoned = true;
  for (int lane = 0; lane < 32; ++lane) {
    std::memcpy(&product.saved[lane * count], product.d[lane], count * sizeof(float));
    for (int i = 0; i < count; ++i) std::memcpy(&product.d[lane][i], &kPoison, 4);
  }
}

void restore(const WgmmaProduct& product) {
  const int count = product.n / 2;
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < count; ++i) {
      uint32_t bits;
      std::memcpy(&bits, &product.d[lane][i], 4);
      if (bits != kPoison)
        fail("wgmma", product.at, format("register %d of lane %d was written while the wgmma that adds to it was under way",
                                         i, lane));
      product.d[lane][i] = product.saved[lane * count + i];
    }
}

void multiply(WgmmaProduct& product) {
  if (product.poisoned) restore(product);
  const int n = product.n;
  float D[16][256] = {};
  // Register 4 j + i of a lane is this element of the warp's rows.
  const auto element = [&](int lane, int j, int i) -> float& {
    return D[lane / 4 + 8 * (i / 2)][8 * j + 2 * (lane % 4) + i % 2];
  };
  if (product.accumulate)
    for (int lane = 0; lane < 32; ++lane)
      for (int j = 0; j < n / 8; ++j)
        for (int i = 0; i < 4; ++i) element(lane, j, i) = product.d[lane][4 * j + i];
  for (int m = 0; m < 16; ++m)
    for (int k = 0; k < 16; ++k) {
      const float a = product.A[m][k];
      const float* __restrict b = &product.B[k * n];
      float* __restrict d = D[m];
      for (int j = 0; j < n; ++j) d[j] += a * b[j];
    }
  for (int lane = 0; lane < 32; ++lane)
    for (int j = 0; j < n / 8; ++j)
      for (int i = 0; i < 4; ++i) product.d[lane][4 * j + i] = element(lane, j, i);
}

// --- issue and completion ------------------------------------------------------------------------------------

// All four warps of the warpgroup issue the same products in the same order.
void check_warpgroup(Warp& warp, const WgmmaProduct& product) {
  auto& calls = warp.block->warpgroups[warp.id / 4].products;
  const size_t first = warp.id / 4 * 4;
  if (first + 4 > warp.block->warps.size())
    fail("wgmma", product.at, format("warp %d belongs to no whole warpgroup", warp.id), "launch a multiple of 128 threads");
  for (size_t i = first; i < first + 4; ++i)
    if (!warp.block->warps[i].alive && warp.block->warps[i].product_count <= warp.product_count)
      fail("wgmma", product.at, format("warp %d issues a product, but warp %zu of the same warpgroup has returned", warp.id, i),
           "issue it from all four warps of the warpgroup");
  if (warp.product_count < calls.size()) {
    const WgmmaCall& call = calls[warp.product_count];
    if (call.a != product.a || call.b != product.b || call.at != product.at)
      fail("wgmma", product.at, format("the warps of warpgroup %d issue different products: another is at %s",
                                       warp.id / 4, text(call.at).c_str()),
           "issue the same wgmma, with the same descriptors, from all four warps of the warpgroup");
  } else {
    calls.push_back({product.a, product.b, product.at});
  }
  ++warp.product_count;
}

void issue(void** arguments, uint32_t, Location at) {
  Warp& warp = *current->warp;
  Block& block = *warp.block;
  Thread* threads = &block.threads[32 * warp.id];
  const auto lane_arguments = [&](int lane) -> const WgmmaArguments& {
    return *static_cast<WgmmaArguments*>(arguments[lane]);
  };
  const WgmmaArguments& first = lane_arguments(0);
  if (!warp.product_fence)
    fail("wgmma", at, "no wgmma_fence since the registers of the product could last be touched");

  auto product = std::make_unique<WgmmaProduct>();
  product->n = first.n;
  product->group = warp.product_group;
  product->accumulate = first.accumulate;
  product->a_mn_major = first.a_mn_major;
  product->b_mn_major = first.b_mn_major;
  product->is_fp16 = first.is_fp16;
  product->a_in_registers = first.a_registers != nullptr;
  product->a = first.a;
  product->b = first.b;
  product->at = at;
  product->time = warp.product_time + 1;
  for (int lane = 0; lane < 32; ++lane) {
    const WgmmaArguments& own = lane_arguments(lane);
    if (own.a != first.a || own.b != first.b || own.accumulate != first.accumulate)
      fail("wgmma", at, format("lane %d has other descriptors, or another `accumulate`, than lane 0", lane),
           "compute them from what all lanes share (shfl_idx(warp_id(), 0) rather than thread_id())");
    product->d[lane] = own.d;
    if (own.a_registers) take_a_from_registers(*product, lane, own.a_registers);
  }
  check_warpgroup(warp, *product);

  // The agent knows what the lanes know together.
  ClockRef known = threads[0].known;
  bool own_copy = false;
  for (int lane = 1; lane < 32; ++lane) {
    if (threads[lane].known == threads[lane - 1].known) continue;
    if (!own_copy) known = Clock::copy(*known);
    own_copy = true;
    known->join(*threads[lane].known);
  }
  const Actor agent{block.wgmma_agent(warp.id), product->time, 32 * warp.id, 32, known.get(), true};
  read_operands(warp, *product, &agent);
  product->captured = happens_early();

  // Products in a row may add to the same registers; the first of them holds what was there.
  const bool in_use = std::any_of(warp.products.begin(), warp.products.end(),
                                  [&](const auto& other) { return other->d[0] == product->d[0]; });
  if (!in_use) poison(*product);
  warp.products.push_back(std::move(product));
}

void complete_groups(Warp& warp, int newest) {
  uint32_t time = 0;
  size_t complete = 0;
  auto& products = warp.products;
  for (; complete < products.size() && products[complete]->group < warp.product_group - newest; ++complete) {
    WgmmaProduct& product = *products[complete];
    if (!product.captured) read_operands(warp, product, nullptr);
    multiply(product);
    time = product.time;
    // Its registers are still those of the next that adds to them.
    for (size_t i = complete + 1; i < products.size(); ++i)
      if (products[i]->d[0] == product.d[0]) {
        poison(*products[i]);
        break;
      }
  }
  products.erase(products.begin(), products.begin() + complete);
  warp.product_fence = false;
  if (!time) return;
  // Lanes that share a clock go on sharing it.
  Thread* threads = &warp.block->threads[32 * warp.id];
  ClockRef before, after;
  for (int lane = 0; lane < 32; ++lane) {
    if (!(threads[lane].known == before)) {
      before = threads[lane].known;
      after = Clock::copy(*before);
      uint32_t& agent_time = (*after)[warp.block->wgmma_agent(warp.id)];
      agent_time = std::max(agent_time, time);
    }
    threads[lane].known = after;
  }
}

}  // namespace

void wgmma_at_exit(Warp& warp) {
  if (!warp.products.empty())
    fail("exit", warp.products[0]->at, "the thread returns while a wgmma is under way",
         "call wgmma_commit, then wgmma_wait<0>");
  const auto& calls = warp.block->warpgroups[warp.id / 4].products;
  if (warp.product_count < calls.size())
    fail("wgmma", calls[warp.product_count].at,
         format("warp %d returns without the wgmma that another warp of its warpgroup has issued", warp.id),
         "issue it from all four warps of the warpgroup");
}

void wgmma(WgmmaArguments arguments, Location at) {
  const char* name = arguments.a_registers ? "wgmma_rs" : "wgmma_ss";
  require_sm90a(name, at);
  const Fault& fault = arguments.a_registers ? registers_fault : shared_fault;
  if (fault.at(at) == Mutation::stride) arguments.b = half_stride(arguments.b);
  collective(name, &arguments, ~0u, issue, at);
}

void wgmma_fence(Location at) {
  require_sm90a("wgmma_fence", at);
  if (fence_fault.at(at) == Mutation::drop) return;
  collective("wgmma_fence", nullptr, ~0u, [](void**, uint32_t, Location) { current->warp->product_fence = true; }, at);
}

void wgmma_commit(Location at) {
  require_sm90a("wgmma_commit", at);
  if (commit_fault.at(at) == Mutation::drop) return;
  collective("wgmma_commit", nullptr, ~0u, [](void**, uint32_t, Location) {
    ++current->warp->product_group;
    ++current->warp->product_time;
  }, at);
}

void wgmma_wait(int newest, Location at) {
  require_sm90a("wgmma_wait", at);
  const Mutation mutation = wait_fault.at(at);
  if (mutation == Mutation::drop) return;
  if (mutation == Mutation::lax) ++newest;
  collective("wgmma_wait", &newest, ~0u, [](void** arguments, uint32_t, Location) {
    complete_groups(*current->warp, *static_cast<int*>(arguments[0]));
  }, at);
}

}  // namespace almostgpt::emulator
