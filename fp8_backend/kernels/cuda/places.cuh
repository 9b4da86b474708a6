// What route.cuh says of where the row of an entry belongs, to kernels that write rows there.
#pragma once
#include "ptx.cuh"

constexpr u32 kNoPlace = 0xffffffffu;  // the entry is left out: its id is negative or has no expert here
