// How functions in headers are compiled: for the host, and by nvcc for the device as well.
//
// All have internal linkage: headers are compiled for several instruction sets into one library, and the linker must
// not share a function between them.
#pragma once

#if defined(__CUDACC__)
#define FASTGUIDE_INLINE static __host__ __device__ __forceinline__
#define FASTGUIDE_UNROLL _Pragma("unroll")
#define FASTGUIDE_ROLL _Pragma("unroll 1")
#else
#define FASTGUIDE_INLINE static inline __attribute__((always_inline))
#define FASTGUIDE_UNROLL
#define FASTGUIDE_ROLL
#endif

// Whether the processor has fused multiply-adds. Where it has none, fmaf would be a call.
#if defined(__CUDACC__) || defined(__FMA__) || defined(__ARM_FEATURE_FMA)
#define FASTGUIDE_HAS_FMA
#endif

// Follows a switch over all values of an enum. Such a switch has no default: a value that it forgets does not compile.
#define FASTGUIDE_UNREACHABLE() __builtin_unreachable()

// Hides from nvcc how a value was made: it then keeps the value, rather than making it again where it is used.
#if defined(__CUDA_ARCH__)
#define FASTGUIDE_KEEP_VALUE(value) asm volatile("" : "+r"(value))
#else
#define FASTGUIDE_KEEP_VALUE(value)
#endif
