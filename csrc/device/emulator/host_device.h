// What device/types.h needs to be told of the side that it is on.
#pragma once

#ifndef HOST_DEVICE
#define HOST_DEVICE inline
#endif
