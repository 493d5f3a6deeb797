// A loop whose iterations are independent, for the compiler that vectorises it.
#pragma once

#if defined(__clang__)
#define FASTGUIDE_INDEPENDENT_ITERATIONS _Pragma("clang loop vectorize(assume_safety)")
#else
#define FASTGUIDE_INDEPENDENT_ITERATIONS _Pragma("GCC ivdep")
#endif
