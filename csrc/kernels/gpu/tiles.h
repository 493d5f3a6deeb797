// Which elements a thread of the GPU kernel computes.
//
// A launch has a number of tiles of kThreads threads each. No thread waits for another, so the same code runs on the
// host in a loop over tiles and threads: the tests do that, without a GPU. step.cu makes kernels of it.
//
// Within a sample, a thread computes vectors of kVector neighbouring elements, read and written 16 bytes at a time. The
// first vector starts where every tensor is at a multiple of 16 bytes; if there is no such element, all are computed
// one by one. So are the elements before the first vector and those behind the last. With torch's noise for a tensor
// larger than torch's own grid, a thread computes the four vectors whose noise comes of the same Philox calls.
#pragma once

#include <cstdint>

#include "kernels/arguments.h"
#include "kernels/cursor.h"
#include "kernels/gpu/parameters.h"
#include "kernels/gpu/thread.h"
#include "kernels/gpu/vector.h"
#include "maths/element.h"
#include "maths/inline.h"
#include "maths/philox.h"

namespace fastguide {

// Where the vectors of a sample may start, for the tensors seen so far: at `first` modulo 2^period_bits. first is -1 if
// no element is at a multiple of 16 bytes in all of them.
struct VectorStart {
  int first, period_bits;
};

FASTGUIDE_INLINE VectorStart with_tensor(VectorStart start, const void* data, int64_t sample, int64_t batch_stride,
                                         Element element) {
  if (data == nullptr || start.first < 0) return start;
  const int size_bits = element_size_bits(element), period_bits = 4 - size_bits;
  const uint64_t begin = reinterpret_cast<uint64_t>(data) + (uint64_t(sample * batch_stride) << size_bits);
  const int first = int((16 - (begin & 15)) & 15) >> size_bits;
  const int common = period_bits < start.period_bits ? period_bits : start.period_bits;
  if (((first ^ start.first) & ((1 << common) - 1)) != 0) return {-1, 0};
  return period_bits > start.period_bits ? VectorStart{first, period_bits} : start;
}

// The sample's first element that begins a vector; -1 if there are no vectors.
FASTGUIDE_INLINE int vector_start(const Launch& launch, int64_t sample) {
  const StepArguments& a = launch.a;
  if (launch.aligned) return 0;
  VectorStart start = {0,
                       a.noise_kind == Noise::portable && a.channels == 1 ? 2 : 0};  // a Philox call's four neighbours
  for_each_input(a, launch.predictions, [&](Argument, const Input& input) {
    start = with_tensor(start, input.data, sample, input.batch_stride, input.element);
  });
  for_each_output(a, [&](Argument, const Output& output, int copies) {
    FASTGUIDE_ROLL
    for (int k = 0; k < copies; ++k) {
      start = with_tensor(start, output.data, k * a.batch + sample, output.batch_stride, output.element);
    }
  });
  return start.first;
}

FASTGUIDE_INLINE uint32_t sample_of(const Launch& launch, uint32_t tile) {
  uint32_t sample = quotient(tile, launch.tiles_per_sample);
  FASTGUIDE_KEEP_VALUE(sample);
  return sample;
}

// A thread's vectors, loaded.
template <typename V>
struct Vectors {
  uint32_t sample, chunk;  // the chunk-th tile of the sample
  int start;
  int64_t place[V::vectors];
  bool whole[V::vectors];
  RawInputs raw[V::vectors];
};

// Reads nothing but a step's tensors, so that the position is not waited for. sample is the tile's.
template <typename V>
FASTGUIDE_INLINE Vectors<V> load_vectors(const Launch& launch, uint32_t sample, uint32_t tile, int thread) {
  Vectors<V> vectors;
  vectors.sample = sample;
  vectors.chunk = tile - sample * launch.tiles_per_sample.divisor;
  FASTGUIDE_KEEP_VALUE(vectors.chunk);
  vectors.start = vector_start(launch, sample);
  const int64_t begin = int64_t(uint64_t(vectors.chunk) * (launch.vectors * kTile));
  const int64_t first = begin + vectors.start + thread * kVector;
  FASTGUIDE_UNROLL
  for (int k = 0; k < V::vectors; ++k) {
    vectors.place[k] = first + k * kTile;
    vectors.whole[k] = vectors.start >= 0 && (k == 0 || uint32_t(k) < launch.vectors) &&
                       vectors.place[k] + kVector <= launch.a.elements_per_sample;
    if (vectors.whole[k]) vectors.raw[k] = load_inputs<V>(launch, sample, vectors.place[k]);
  }
  return vectors;
}

// Computes single elements: all of the tile, or, in one more tile, those before the first vector and behind the last.
template <typename V>
FASTGUIDE_INLINE void step_singles(const Launch& launch, const SampleRow& r, const Vectors<V>& vectors, int thread) {
  const int start = vectors.start;
  if (start >= 0 && vectors.chunk < launch.vector_tiles) return;
  const int64_t size = launch.a.elements_per_sample, tile = launch.vectors * kTile;
  int64_t next = vectors.chunk * tile + thread, end = next < size ? (vectors.chunk + 1) * tile : 0;
  end = end < size ? end : size;
  if (start >= 0) {
    const int64_t behind = size > start ? (size - start) / kVector * kVector + start : size;
    next = thread < start ? thread : behind + thread - start;
    end = next < size && (thread < start || next >= behind) ? next + 1 : 0;
  }
  FASTGUIDE_ROLL
  for (; next < end; next += kThreads) {
    const SingleInputs bits = load_single<V>(launch, vectors.sample, next);
    step_single<V>(launch, r, bits, TorchStream{}, vectors.sample, next);
  }
}

// position is that of the tile's sample.
template <typename V>
FASTGUIDE_INLINE void step_tile(const Launch& launch, const Vectors<V>& vectors, const Position& position, int thread) {
  if (!is_live(launch.a, position)) return;
  const SampleRow r = row_of<V>(launch, vectors.sample, position);
  FASTGUIDE_UNROLL
  for (int k = 0; k < V::vectors; ++k) {
    if (!vectors.whole[k]) continue;
    float z[kVector] = {};
    if constexpr (V::noise == Noise::portable) draw_vector(launch.a, r.step, vectors.sample, vectors.place[k], z);
    step_vector<V>(launch, r, vectors.raw[k], z, vectors.sample, vectors.place[k]);
  }
  step_singles<V>(launch, r, vectors, thread);
}

// The torch stream for any tensor, one element a thread.
struct Single {
  uint32_t sample;
  int64_t place;
  SingleInputs bits;
};

template <typename V>
FASTGUIDE_INLINE Single load_torch_single(const Launch& launch, uint32_t sample, uint32_t tile, int thread) {
  Single single{};
  single.sample = sample;
  single.place = int64_t(tile - sample * launch.tiles_per_sample.divisor) * kThreads + thread;
  if (single.place < launch.a.elements_per_sample) single.bits = load_single<V>(launch, sample, single.place);
  return single;
}

template <typename V>
FASTGUIDE_INLINE void step_torch_single(const Launch& launch, const Single& single, const TorchStream& stream,
                                        const Position& position) {
  if (!is_live(launch.a, position) || single.place >= launch.a.elements_per_sample) return;
  const SampleRow r = row_of<V>(launch, single.sample, position);
  step_single<V>(launch, r, single.bits, stream, single.sample, single.place);
}

// Whether the torch stream is drawn in vectors: a thread then computes the four vectors whose values are made by the
// same Philox calls. They are those of contiguous samples made of aligned vectors, in tensors larger than torch's grid.
FASTGUIDE_INLINE bool torch_vectors_fit(const Launch& launch) {
  const int64_t total = launch.a.batch * launch.a.elements_per_sample, threads = launch.a.torch_stream.threads;
  return torch_vectors_compiled(launch.a.num_predictions, extras_of(launch.a)) && launch.aligned &&
         launch.a.channels == 1 && launch.a.elements_per_sample % kVector == 0 && threads % kVector == 0 &&
         total > threads && total <= 0x7FFFFFFF;
}

FASTGUIDE_INLINE uint32_t torch_units(const StepArguments& a) {  // the number of threads for that
  const int64_t round = int64_t(a.torch_stream.threads) * kTorchValues;
  return uint32_t((a.batch * a.elements_per_sample + round - 1) / round) * (a.torch_stream.threads / kVector);
}

// shared has kTorchValues * kVector * kThreads floats of the block, of which each thread uses its own. position is that
// of the first sample, and of all samples if there is a cursor.
template <typename V>
FASTGUIDE_INLINE void torch_vector_tile(const Launch& launch, const TorchStream& stream, const Position& position,
                                        uint32_t tile, int thread, float* shared) {
  if (!is_live(launch.a, position)) return;
  const StepArguments& a = launch.a;
  const uint32_t unit = tile * kThreads + thread, call = quotient(unit, launch.units_per_call);
  const uint32_t torch_thread = (unit - call * launch.units_per_call.divisor) * kVector;
  float* z = shared + thread;
  FASTGUIDE_UNROLL
  for (int i = 0; i < kVector; ++i) {
    const Philox4 r = torch_call(stream.seed, stream.offset, call, torch_thread + i);
    const Normal2 low = torch_normal(r.x, r.y), high = torch_normal(r.z, r.w);
    z[(0 * kVector + i) * kThreads] = low.first;
    z[(1 * kVector + i) * kThreads] = low.second;
    z[(2 * kVector + i) * kThreads] = high.first;
    z[(3 * kVector + i) * kThreads] = high.second;
  }
  SampleRow r = row_of<V>(launch, 0, position);
  FASTGUIDE_ROLL
  for (int value = 0; value < kTorchValues; ++value) {
    const int64_t element = (int64_t(call) * kTorchValues + value) * stream.threads + torch_thread;
    if (element >= a.batch * a.elements_per_sample) return;
    const uint32_t sample = quotient(uint32_t(element), launch.elements_per_sample);
    const int64_t place = element - sample * a.elements_per_sample;
    const RawInputs raw = load_inputs<V>(launch, sample, place);
    if (launch.per_sample) r = row_of<V>(launch, sample, a.cursor != nullptr ? position : position_of(a, sample));
    float values[kVector];
    FASTGUIDE_UNROLL
    for (int i = 0; i < kVector; ++i) {
      values[i] = rounded_as(a.sample.element, z[(value * kVector + i) * kThreads]);
    }
    step_vector<V>(launch, r, raw, values, sample, place);
  }
}

}  // namespace fastguide
