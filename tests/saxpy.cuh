// A kernel for the tests of the compiler, the cache and the launcher: out[i] = scale * i + OFFSET.
#include "saxpy_offset.cuh"

extern "C" __global__ void saxpy(float* out, float scale, int count) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) out[i] = scale * i + offset();
}
