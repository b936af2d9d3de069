// Who runs: one thread at a time, until it waits, or, with a seed, is preempted.
#pragma once

#include "device/emulator/block.h"
#include "device/emulator/launch.h"
#include "device/emulator/runtime.h"

namespace almostgpt::emulator {

extern Thread* current;  // null: the host

// Runs the blocks of running->blocks until all their threads have returned.
void run_blocks();

// The current thread waits until another makes it ready.
void wait(const char* what, Location at, uint32_t argument = 0);
// The same, until every other thread waits or has returned.
void wait_until_nobody_runs(const char* what, Location at);
void make_ready(Warp& warp, uint32_t lanes);

// With a seed, now and then another thread goes on.
void preempt_now();
inline void preempt() {
  if (running->options.seed && (running->random() & 63) == 0) preempt_now();
}

// The current thread looked at `address` and found `value`. If it has before, and memory has not
// changed, it spins: others run until something changes. When all that can run spins, that is a deadlock.
void poll(uint64_t address, uint32_t value, Location at);
// That lane goes on at once.
void switch_to_lane(Warp& warp, int lane);
inline void memory_changed() { ++running->changes; }
// The current thread counts up an atomic, perhaps until it gets a turn: others run now and then.
void take_turns(Location at);

// What an asynchronous operation may be: delayed to the last moment, at once, or either.
inline bool happens_early() {
  const Asynchrony asynchrony = running->options.asynchrony;
  return asynchrony == Asynchrony::early || (asynchrony == Asynchrony::random && running->random.one_in(2));
}

// --- what threads know ------------------------------------------------------------------------------------

// Adds what the thread knows; what it does from now on is later.
void release(Thread& thread, Arrivals& arrivals);
// The thread knows this too.
void acquire(Thread& thread, const ClockRef& clock);
void acquire(Thread& thread, const KnowledgeRef& knowledge);
// All that it knows, for other blocks; what it does from now on is later.
KnowledgeRef publish(Thread& thread);

}  // namespace almostgpt::emulator
