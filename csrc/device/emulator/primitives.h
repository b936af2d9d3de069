// The emulator's side of device.cuh: the names and signatures of device/cuda/, which describes them. Every
// primitive takes one argument more, by default the place of the call.
#pragma once

#include "device/emulator/primitives_core.h"
#include "device/emulator/primitives_sm80.h"
#include "device/emulator/primitives_sm90.h"
