// How the blocks of a launch find out which of them is the last. Device only, behind CUDA's own header.
#pragma once

namespace fastguide {

// Increments a number, and orders what the block has done before it, without the full fence that would empty the cache.
static __device__ unsigned count_released(unsigned* number) {
#if defined(__CUDA_ARCH__)
  unsigned before;
  asm volatile("atom.add.release.gpu.global.u32 %0, [%1], 1;"
               : "=r"(before)
               : "l"(__cvta_generic_to_global(number))
               : "memory");
  return before;
#else
  return atomicAdd(number, 1u);
#endif
}

}  // namespace fastguide
