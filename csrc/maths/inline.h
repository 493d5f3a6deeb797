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

// Follows a switch over all values of an enum. Such a switch has no default: a value that it forgets does not compile.
#define FASTGUIDE_UNREACHABLE() __builtin_unreachable()
