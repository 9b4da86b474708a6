#pragma once

__device__ inline float offset() { return OFFSET; }
