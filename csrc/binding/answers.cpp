// What fastguide/step/backends/native.py asks the library: what it was built of, so that no other package takes it.
#include "binding/capability.h"
#include "binding/record.h"
#include "kernels/arguments.h"
#include "kernels/gpu/groups.h"
#include "kernels/thresholds.h"
#include "maths/program.h"
#include "maths/step.h"
#if defined(FASTGUIDE_CUDA)
#include "kernels/gpu/launch.h"
#endif

#define FASTGUIDE_EXPORT extern "C" __attribute__((visibility("default")))

// The most predictions of a step on a GPU.
FASTGUIDE_EXPORT int fastguide_gpu_predictions() { return fastguide::kMaxPredictions; }

// The size of a record of so many predictions: see record_step.
FASTGUIDE_EXPORT int fastguide_record_bytes(int predictions) {
  return static_cast<int>(sizeof(fastguide::Record) + sizeof(fastguide::Input) * static_cast<size_t>(predictions));
}

// Selects the instruction set (0 baseline, 1 AVX2, 2 AVX-512), at most the processor's best; a negative level changes
// nothing. Returns the one in use.
FASTGUIDE_EXPORT int fastguide_cpu_capability(int level) {
  return static_cast<int>(fastguide::select_capability(level));
}

// The names of a row's columns, in order, each followed by a comma.
FASTGUIDE_EXPORT const char* fastguide_row_columns() {
#define FASTGUIDE_NAME(name) #name ","
  return FASTGUIDE_ROW(FASTGUIDE_NAME);
#undef FASTGUIDE_NAME
}

// The types and names of the operator's arguments, in order, each followed by a comma.
FASTGUIDE_EXPORT const char* fastguide_arguments() {
#define FASTGUIDE_NAME(type, name) #type " " #name ","
  return FASTGUIDE_ARGUMENTS(FASTGUIDE_NAME);
#undef FASTGUIDE_NAME
}

// The operations of a program, in order, each followed by a comma.
FASTGUIDE_EXPORT const char* fastguide_operations() {
#define FASTGUIDE_NAME(name) #name ","
  return FASTGUIDE_OPERATIONS(FASTGUIDE_NAME);
#undef FASTGUIDE_NAME
}

// The most terms and values of a program.
FASTGUIDE_EXPORT int fastguide_program_terms() { return fastguide::kMaxTerms; }
FASTGUIDE_EXPORT int fastguide_program_values() { return fastguide::kMaxValues; }

// The most elements of a group whose weights a step makes on a GPU.
FASTGUIDE_EXPORT int fastguide_group_elements() { return static_cast<int>(fastguide::kMostOfGroup); }

// The most terms of such a group's guidance.
FASTGUIDE_EXPORT int fastguide_group_terms() { return fastguide::kMostOfGroupTerms; }

// The words of a sample's threshold on a GPU.
FASTGUIDE_EXPORT int fastguide_threshold_words() { return fastguide::kThresholdWords; }

// The architectures that the GPU kernels were compiled for, or "none: " and the reason.
FASTGUIDE_EXPORT const char* fastguide_cuda_code() { return FASTGUIDE_CUDA_CODE; }

// Whether there is a driver that is too old for the CUDA runtime in this library.
FASTGUIDE_EXPORT int fastguide_driver_too_old() {
#if defined(FASTGUIDE_CUDA)
  return fastguide::cuda::driver_too_old();
#else
  return 0;
#endif
}
