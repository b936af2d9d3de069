#include "device/emulator/launch.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <numeric>

#include "device/emulator/global_memory.h"
#include "device/emulator/report.h"
#include "device/emulator/scheduler.h"

namespace almostgpt::emulator {

Launch* running = nullptr;

namespace {

// Where the launch is asked for is host code that no primitive tells.
constexpr Location kHost = {};

// Of "… [with auto kernel = almostgpt::{anonymous}::copy<float, 4>; Arguments = …]" (g++; clang++ writes a
// comma and "(anonymous namespace)") it is "copy<float, 4>".
std::string kernel_name(const char* described) {
  std::string name = described;
  const size_t start = name.find("kernel = ");
  if (start == std::string::npos) return name;
  name = name.substr(start + std::strlen("kernel = "));
  int depth = 0;
  for (size_t i = 0; i < name.size(); ++i) {
    if (name[i] == '<' || name[i] == '(') ++depth;
    if (depth == 0 && (name[i] == ';' || name[i] == ',' || name[i] == ']')) name.resize(i);
    else if (name[i] == '>' || name[i] == ')') --depth;
  }
  // Without qualifiers; of "(& copy<float>)" and "void copy(int) [with …]" the name alone.
  std::string plain;
  for (size_t i = 0; i < name.size(); ++i) {
    if (name.compare(i, 2, "::") == 0) {
      size_t begin = plain.size();
      if (begin && (plain.back() == '}' || plain.back() == ')')) begin = plain.rfind(plain.back() == '}' ? '{' : '(');
      else while (begin && (std::isalnum(static_cast<unsigned char>(plain[begin - 1])) || plain[begin - 1] == '_')) --begin;
      plain.resize(begin);
      ++i;
    } else {
      plain += name[i];
    }
  }
  while (!plain.empty() && (plain.front() == '(' || plain.front() == '&' || plain.front() == ' ')) plain.erase(0, 1);
  if (!plain.empty() && plain.back() == ')' && plain.find('(') == std::string::npos) plain.pop_back();
  return plain;
}

int blocks_that_fit(const device::LaunchShape& shape, const CardLimits& limits) {
  const int threads = (shape.threads + 31) / 32 * 32;
  const int shared = static_cast<int>(shape.shared_bytes) + kReservedSharedBytes;
  return std::min({limits.threads_per_multiprocessor / threads,
                   limits.shared_bytes_per_multiprocessor / shared, limits.blocks_per_multiprocessor});
}

void check_limits(const device::LaunchShape& shape, const CardLimits& limits) {
  const device::Card card = session_card();
  const Dim3& grid = shape.grid;
  if (shape.threads < 1 || shape.threads > kMaxThreads)
    fail("launch", kHost, format("%d threads in a block; a card allows 1 to %d", shape.threads, kMaxThreads));
  if (shape.shared_bytes > static_cast<uint32_t>(card.shared_bytes_per_block))
    fail("launch", kHost, format("%u bytes of shared memory for a block; a card of %d.%d has %d", shape.shared_bytes,
                                 card.major, card.minor, card.shared_bytes_per_block));
  if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    fail("launch", kHost, format("a grid of (%u, %u, %u); each is at least 1, x at most 2147483647, y and z at most 65535",
                                 grid.x, grid.y, grid.z));
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  if (blocks > 0xffffffffu) fail("launch", kHost, "more than 2^32 blocks are too many for the emulator");
  if (shape.co_resident) {
    const int each = blocks_that_fit(shape, limits);
    const uint64_t room = uint64_t(card.multiprocessors) * each;
    if (blocks > room)
      fail("launch", kHost,
           format("%llu co-resident blocks of %d threads and %u bytes of shared memory; a card of %d.%d with %d "
                  "multiprocessors holds %d of them each, %llu together",
                  static_cast<unsigned long long>(blocks), shape.threads, shape.shared_bytes, card.major, card.minor,
                  card.multiprocessors, each, static_cast<unsigned long long>(room)));
  }
}

// Whatever happens, the next launch finds nothing of this one.
struct Cleanup {
  Stacks& stacks;
  ~Cleanup() {
    current = nullptr;
    running = nullptr;
    stacks.keep(kMaxThreads);
  }
};

}  // namespace

int run_kernel(const char* described, const device::LaunchShape& shape, const std::function<void()>& thread_body) {
  static Stacks& stacks = *new Stacks;
  if (!session_limits()) fail("session", kHost, "a kernel was launched outside of a session");
  if (running) fail("session", kHost, "a kernel was launched by a kernel");

  const Cleanup cleanup{stacks};
  Clock::set_actors(Block::actors(std::clamp(shape.threads, 1, kMaxThreads)));
  const std::string name = kernel_name(described);
  Launch launch{name, shape, *session_limits(), thread_body, options(), Random(options().seed), statistics_of(name)};
  running = &launch;
  check_limits(shape, launch.limits);

  const uint32_t count = shape.grid.x * shape.grid.y * shape.grid.z;
  launch.statistics.launches += 1;
  launch.statistics.blocks += count;
  begin_global_memory(launch);

  // Blocks start in any order.
  std::vector<uint32_t> order(count);
  std::iota(order.begin(), order.end(), 0u);
  if (launch.options.seed)
    for (uint32_t i = count; i > 1; --i) std::swap(order[i - 1], order[launch.random.below(i)]);

  const uint32_t at_once = shape.co_resident ? count : 1;
  std::vector<std::unique_ptr<Block>> blocks(at_once);
  for (auto& block : blocks) block = std::make_unique<Block>();
  for (uint32_t start = 0; start < count; start += at_once) {
    launch.blocks.clear();
    for (uint32_t i = 0; i < at_once; ++i) {
      Block& block = *blocks[i];
      block.reset(order[start + i], stacks, size_t{i} * shape.threads);
      block.where = place_of(block.index);
      launch.blocks.push_back(&block);
    }
    launch.alive = static_cast<int>(at_once) * shape.threads;
    run_blocks();
  }
  return 0;
}

Dim3 place_of(uint32_t index) {
  const Dim3& grid = running->shape.grid;
  return Dim3{index % grid.x, index / grid.x % grid.y, index / grid.x / grid.y};
}

void Block::reset(uint32_t new_index, Stacks& stacks, size_t first_stack) {
  const device::LaunchShape& shape = running->shape;
  const int warp_count = (shape.threads + 31) / 32;
  index = new_index;
  threads.resize(shape.threads);
  warps.resize(warp_count);
  warpgroups.assign((warp_count + 3) / 4, Warpgroup());
  warps_ready = warp_count == 32 ? ~0u : (1u << warp_count) - 1;
  warps_spinning = 0;
  alive = shape.threads;
  for (Barrier& barrier : barriers) barrier = Barrier();
  mbarriers.clear();
  register_waiters = 0;
  // The registers of a multiprocessor, shared out in units of 8; a thread has at most 255, which takes 256.
  const int registers = std::min(65536 / (warp_count * 32) / 8 * 8, 256);
  free_registers = 0;

  for (int w = 0; w < warp_count; ++w) {
    Warp& warp = warps[w];
    const int lanes = std::min(32, shape.threads - 32 * w);
    warp.block = this;
    warp.id = w;
    warp.alive = warp.ready = lanes == 32 ? ~0u : (1u << lanes) - 1;
    warp.spinning = 0;
    for (Collective& collective : warp.collectives) collective.arrived = 0;
    warp.products.clear();
    warp.product_group = 0;
    warp.product_time = 0;
    warp.product_fence = false;
    warp.product_count = 0;
    warp.registers = registers;
    warp.register_changes = 0;
    warp.store_time = 0;
    warp.accesses.clear();
    std::fill(std::begin(warp.cursor), std::end(warp.cursor), 0u);
  }

  const ClockRef nothing = Clock::zero();
  for (int t = 0; t < shape.threads; ++t) {
    Thread& thread = threads[t];
    thread.fiber.prepare(stacks[first_stack + t], t);
    thread.block = this;
    thread.warp = &warps[t / 32];
    thread.id = t;
    thread.lane = t % 32;
    thread.alive = true;
    thread.waiting = Waiting();
    thread.time = 1;
    thread.known = nothing;
    thread.proxy_fences.clear();
    thread.copies.clear();
    thread.copy_group = 0;
    thread.stores.clear();
    thread.store_group = 0;
    thread.fenced.reset();
    thread.seen.reset();
    thread.polled.clear();
    thread.polled_at = 0;
  }

  if (!shared_memory || shared_bytes != shape.shared_bytes) {
    shared_bytes = shape.shared_bytes;
    // aligned_alloc wants a multiple of the alignment.
    const size_t bytes = (shared_bytes + 2047) & ~size_t{1023};
    shared_memory = {static_cast<unsigned char*>(std::aligned_alloc(1024, bytes)), std::free};
  }
  std::memset(shared_memory.get(), 0xff, shared_bytes);  // NaNs
  if (running->options.check) shared_cells.assign((shared_bytes + 3) / 4, SharedCell());
}

std::string Block::name_of(int actor) const {
  const int warp_count = static_cast<int>(warps.size());
  if (is_thread(actor)) return format("thread %d (warp %d, lane %d)", actor, actor / 32, actor % 32);
  if (actor < wgmma_agent(0)) return format("the TMA load for the mbarrier at 0x%x", mbarriers[actor - size()].address);
  if (actor < store_reader(0)) return format("the wgmma of warp %d", actor - wgmma_agent(0));
  return format("the TMA store of warp %d", (actor - store_reader(0)) % warp_count);
}

}  // namespace almostgpt::emulator
