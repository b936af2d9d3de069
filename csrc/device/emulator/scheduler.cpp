#include "device/emulator/scheduler.h"

#include <cstring>
#include <exception>
#include <map>

#include "device/emulator/report.h"
#include "device/emulator/runtime.h"

namespace almostgpt::emulator {

Thread* current = nullptr;
Where where;

namespace {

// Rounds in which every thread that can run polls once and nothing changes: so many are no accident.
constexpr int kIdleRounds = 256;
// A thread that polls or counts up an atomic so often lets others run, whatever it finds.
constexpr int kPollsInTurn = 64;
// So much a thread remembers of what it has polled.
constexpr size_t kPolled = 4096;

Fiber host;
std::exception_ptr failure;

int lowest(uint32_t bits) { return __builtin_ctz(bits); }

void switch_to(Thread* thread, bool ends = false) {
  Thread* from = current;
  if (thread == from) return;
  current = thread;
  running->polls_in_turn = 0;
  if (thread) {
    where.thread = thread->id;
    where.lane = thread->lane;
    where.warp = thread->warp->id;
    where.block = thread->block->where;
  }
  Fiber::switch_between(from ? from->fiber : host, thread ? thread->fiber : host, ends);
}

void wake_spinning() {
  for (Block* block : running->blocks)
    while (block->warps_spinning) {
      Warp& warp = block->warps[lowest(block->warps_spinning)];
      make_ready(warp, std::exchange(warp.spinning, 0u));
      block->warps_spinning &= block->warps_spinning - 1;
    }
  running->spinning = 0;
  running->changes_at_wake = running->changes;
}

std::string state_of(const Thread& thread) {
  const Block& block = *thread.block;
  const Waiting& waiting = thread.waiting;
  std::string state = std::string(waiting.what) + " at " + text(waiting.at);
  if (!std::strcmp(waiting.what, "mbar_wait")) {
    for (const Mbarrier& mbarrier : block.mbarriers)
      if (mbarrier.address == (waiting.argument & ~1u))
        state += format(" for parity %u of the mbarrier at 0x%x, which is in phase %u with %d of %d arrivals and %lld "
                        "bytes to come",
                        waiting.argument & 1, mbarrier.address, mbarrier.phase, mbarrier.pending, mbarrier.expected,
                        static_cast<long long>(mbarrier.bytes));
  } else if (!std::strcmp(waiting.what, "barrier")) {
    const Barrier& barrier = block.barriers[waiting.argument];
    state += format(" (barrier %u: %d of %d arrived)", waiting.argument, barrier.arrived, barrier.expected);
  } else if (!std::strcmp(waiting.what, "setmaxnreg_inc")) {
    state += format(" for %u registers a thread; %d are free", waiting.argument, block.free_registers);
  }
  return state;
}

[[noreturn]] void deadlock() {
  std::map<std::string, std::vector<const Thread*>> groups;
  int exited = 0;
  bool spin = false;
  Location first;
  const char* kind = "deadlock";
  for (const Block* block : running->blocks)
    for (const Thread& thread : block->threads) {
      if (!thread.alive) {
        ++exited;
        continue;
      }
      spin |= thread.warp->spinning >> thread.lane & 1;
      if (!std::strcmp(thread.waiting.what, "setmaxnreg_inc")) kind = "registers";
      if (first.line == 0) first = thread.waiting.at;
      groups[state_of(thread)].push_back(&thread);
    }
  std::string list;
  for (const auto& [state, threads] : groups) {
    const Thread& a = *threads.front();
    const Thread& b = *threads.back();
    list += format("\n    %zu threads (first: block (%u, %u, %u) thread %d; last: block (%u, %u, %u) thread %d) in ",
                   threads.size(), a.block->where.x, a.block->where.y, a.block->where.z, a.id, b.block->where.x,
                   b.block->where.y, b.block->where.z, b.id);
    list += state;
  }
  list += format("\n    %d threads have returned", exited);
  fail(kind, first,
       (spin ? "every thread that can run spins, and nothing changes:" : "no thread can run:") + list);
}

Block& block_in_turn() { return *running->blocks[running->block_in_turn]; }

// Moves block_in_turn to a block with a ready warp; false: there is none.
bool find_ready_block() {
  const size_t count = running->blocks.size();
  if (count > 1 && running->options.seed && running->random.one_in(32))
    running->block_in_turn = running->random.below(count);
  for (size_t tried = 0; tried < count; ++tried) {
    if (block_in_turn().warps_ready) return true;
    running->block_in_turn = (running->block_in_turn + 1) % count;
  }
  return false;
}

// In order: the next lane of the same warp, else the next warp. With a seed, any.
Thread* ready_thread(Block& block) {
  Random& random = running->random;
  const bool shuffled = running->options.seed != 0;
  const bool same_block = current && current->block == &block;
  const uint32_t ready = block.warps_ready;
  int w = same_block ? current->warp->id : 0;
  if (shuffled && random.one_in(8)) {
    uint32_t rest = ready;
    for (uint32_t skip = random.below(__builtin_popcount(ready)); skip > 0; --skip) rest &= rest - 1;
    w = lowest(rest);
  } else if (!(ready >> w & 1)) {
    const uint32_t later = w < 31 ? ready >> (w + 1) << (w + 1) : 0;
    w = lowest(later ? later : ready);
  }
  const uint32_t lanes = block.warps[w].ready;
  const int start = shuffled ? random() & 31 : same_block && current->warp->id == w ? (current->lane + 1) & 31 : 0;
  const uint32_t later = lanes >> start << start;
  return &block.threads[32 * w + lowest(later ? later : lanes)];
}

// Who goes on. Late asynchronous loads happen when nobody can, the newest first.
Thread* next_thread() {
  Launch& launch = *running;
  for (;;) {
    if (!launch.loads.empty() && launch.options.asynchrony == Asynchrony::random && launch.random.one_in(8))
      complete_tma_load(launch.random.below(launch.loads.size()));
    if (launch.spinning && launch.options.seed && launch.random.one_in(16)) wake_spinning();
    if (find_ready_block()) return ready_thread(block_in_turn());
    if (launch.spinning && launch.changes != launch.changes_at_wake) {
      launch.idle_rounds = 0;
      wake_spinning();
    } else if (!launch.loads.empty()) {
      complete_tma_load(launch.options.asynchrony == Asynchrony::random ? launch.random.below(launch.loads.size())
                                                                        : launch.loads.size() - 1);
    } else if (launch.spinning && launch.idle_rounds < kIdleRounds) {
      ++launch.idle_rounds;
      wake_spinning();
    } else if (!launch.last_to_run.empty()) {
      Thread& thread = *launch.last_to_run.back();
      launch.last_to_run.pop_back();
      make_ready(*thread.warp, 1u << thread.lane);
    } else {
      deadlock();
    }
  }
}

void not_ready(Thread& thread) {
  Warp& warp = *thread.warp;
  warp.ready &= ~(1u << thread.lane);
  if (!warp.ready) warp.block->warps_ready &= ~(1u << warp.id);
}

void spin(const char* what, Location at) {
  Thread& me = *current;
  me.waiting = {what, at, 0};
  not_ready(me);
  me.warp->spinning |= 1u << me.lane;
  me.block->warps_spinning |= 1u << me.warp->id;
  ++running->spinning;
  switch_to(next_thread());
}

// The end of the current thread; returns who goes on.
Thread* finish_thread() {
  Thread& me = *current;
  thread_exits(me);
  me.alive = false;
  me.warp->alive &= ~(1u << me.lane);
  not_ready(me);
  if (--me.block->alive == 0) barriers_at_exit(*me.block);
  if (--running->alive > 0) return next_thread();
  if (!running->loads.empty()) fail("exit", running->loads[0].at, "the block ends while a TMA load is under way");
  return nullptr;
}

}  // namespace

extern "C" void almostgpt_fiber_main() {
  fiber_entered();
  Thread* next = nullptr;
  try {
    running->thread_body();
    next = finish_thread();
  } catch (...) {
    failure = std::current_exception();
  }
  switch_to(next, true);
  __builtin_unreachable();
}

void run_blocks() {
  current = nullptr;
  failure = nullptr;
  running->block_in_turn = 0;
  running->spinning = running->idle_rounds = 0;
  running->last_to_run.clear();
  where.block_size = running->shape.threads;
  where.grid = running->shape.grid;
  switch_to(next_thread());
  if (failure) std::rethrow_exception(std::exchange(failure, nullptr));
}

void wait(const char* what, Location at, uint32_t argument) {
  Thread& me = *current;
  me.waiting = {what, at, argument};
  not_ready(me);
  switch_to(next_thread());
}

void wait_until_nobody_runs(const char* what, Location at) {
  running->last_to_run.push_back(current);
  wait(what, at);
}

void make_ready(Warp& warp, uint32_t lanes) {
  warp.ready |= lanes;
  if (warp.ready) warp.block->warps_ready |= 1u << warp.id;
}

void switch_to_lane(Warp& warp, int lane) { switch_to(&warp.block->threads[32 * warp.id + lane]); }

void preempt_now() { switch_to(next_thread()); }

void poll(uint64_t address, uint32_t value, Location at) {
  Thread& me = *current;
  if (me.polled_at != running->changes || me.polled.size() >= kPolled) {
    me.polled.clear();
    me.polled_at = running->changes;
  }
  const uint64_t key = (address * 0x9e3779b97f4a7c15ull ^ value) * 31 + at.line;
  const bool seen_before = !me.polled.insert(key).second;
  if (seen_before) spin("a spin-wait", at);
  else take_turns(at);
}

void take_turns(Location at) {
  if (++running->polls_in_turn >= kPollsInTurn) spin("a spin-wait", at);
}

// --- what threads know ------------------------------------------------------------------------------------

void release(Thread& thread, Arrivals& arrivals) {
  arrivals.add(thread.known);
  (*arrivals.joined())[thread.id] = thread.time++;
}

void acquire(Thread& thread, const ClockRef& clock) {
  if (!clock || thread.known == clock) return;
  Launch& launch = *running;
  if (!(launch.joined_a == thread.known && launch.joined_b == clock)) {
    ClockRef joined = thread.known;
    if (!thread.known->knows_all_of(*clock)) {
      joined = Clock::copy(*thread.known);
      joined->join(*clock);
    }
    launch.joined_a = thread.known;
    launch.joined_b = clock;
    launch.joined = joined;
  }
  thread.known = launch.joined;
}

void acquire(Thread& thread, const KnowledgeRef& knowledge) {
  if (!knowledge) return;
  const uint32_t own = thread.block->index;
  ClockRef known = Clock::copy(*thread.known);
  if (const ClockRef* of_own = find(knowledge, own)) known->join(**of_own);
  known->others = join(known->others, without(knowledge, own));
  thread.known = known;
}

KnowledgeRef publish(Thread& thread) {
  ClockRef own = Clock::copy(*thread.known);
  (*own)[thread.id] = thread.time++;
  own->others.reset();
  auto mine = std::make_shared<Knowledge>();
  mine->emplace_back(thread.block->index, own);
  return join(thread.known->others, mine);
}

}  // namespace almostgpt::emulator
