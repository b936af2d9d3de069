// What TMA does with mbarriers.
#pragma once

#include "device/emulator/block.h"

namespace almostgpt::emulator {

// The mbarrier at that address, initialised, and known to be so by the current thread.
Mbarrier& mbarrier_at(uint32_t address, const char* what, Location at);
// Ends the phase if nothing is missing any more.
void complete_phase(Block& block, Mbarrier& mbarrier, Location at);

}  // namespace almostgpt::emulator
