// Draws the portable noise stream on the CPU, in runs of neighbouring elements. torch's own is drawn before the step:
// fastguide/step/draw.py.
//
// Compiled once for each instruction set, like step.cpp, but with -ffp-contract=off: see philox.h.
#include "kernels/cpu/launch.h"
#include "maths/philox.h"

namespace fastguide {
namespace FASTGUIDE_ISA {
namespace {

constexpr int kCalls = kBlock / 4 + 1;  // one more for a run that begins and ends within a call's four values

void neighbours(uint64_t seed, uint32_t step, int64_t begin, int64_t count, float* z) {
  const uint64_t first = uint64_t(begin) / 4;
  const int skipped = int(begin % 4), calls = int((skipped + count + 3) / 4);
  uint32_t x[kCalls], y[kCalls], u[kCalls], v[kCalls];
  for (int i = 0; i < calls; ++i) {
    const uint64_t block = first + i;
    const Philox4 r = philox4x32_10({uint32_t(block), uint32_t(block >> 32), step, 0}, seed);
    x[i] = r.x;
    y[i] = r.y;
    u[i] = r.z;
    v[i] = r.w;
  }
  float normals[4][kCalls];
  for (int i = 0; i < calls; ++i) {
    const Normal2 low = portable_normal(x[i], y[i]), high = portable_normal(u[i], v[i]);
    normals[0][i] = low.first;
    normals[1][i] = low.second;
    normals[2][i] = high.first;
    normals[3][i] = high.second;
  }
  for (int i = 0; i < int(count); ++i) z[i] = normals[(i + skipped) % 4][(i + skipped) / 4];
}

}  // namespace

void portable_noise(const StepArguments& a, int64_t sample, uint32_t step, int64_t begin, int64_t count, float* z) {
  const uint64_t seed = uint64_t(a.seeds[sample * a.seeds_stride]);
  if (a.channels == 1) {
    neighbours(seed, step, begin, count, z);
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    z[i] = portable_normal_of(seed, step, uint64_t(counted_place(begin + i, a.channels, a.elements_per_sample)));
  }
}

}  // namespace FASTGUIDE_ISA
}  // namespace fastguide
