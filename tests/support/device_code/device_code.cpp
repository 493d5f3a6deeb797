// Runs the GPU kernels on the host, for the tests: csrc/kernels/gpu/step.cu itself, in a loop over blocks and threads.
//
// Accesses of 16 bytes are counted, and refused where a GPU would fault or where they leave the sample's memory.
#include <dlfcn.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <optional>
#include <random>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

static void check_access(const void* address);
static int64_t few_tiles;   // see make_launch.h
static int64_t most_parts;  // see joined.h
static bool step_groups;    // see groups.h
#define FASTGUIDE_CHECK_ALIGNED(address) check_access(address)
#define FASTGUIDE_FEW_TILES few_tiles
#define FASTGUIDE_MOST_PARTS most_parts
#define FASTGUIDE_STEP_GROUPS step_groups
#define FASTGUIDE_HAS_FMA  // fmaf is exact, if slow: the results are those of a GPU
#include "kernels/gpu/backward.cu"
#include "kernels/gpu/groups.cu"
#include "kernels/gpu/moments.cu"
#include "kernels/gpu/step.cu"
#include "kernels/gpu/thresholds.cu"

namespace py = pybind11;
using namespace fastguide;

// ---- Accesses of 16 bytes ----

struct Samples {  // of one tensor, in bytes
  uint64_t begin, stride, count, run;

  bool hold(uint64_t place) const {
    if (place < begin) return false;
    const uint64_t offset = place - begin;
    if (stride < run) return offset + 16 <= (count - 1) * stride + run;  // one, the same for all, or overlapping
    const uint64_t sample = offset / stride;
    return sample < count && offset - sample * stride + 16 <= run;
  }
};

static std::vector<Samples> allowed;
static uint64_t accesses = 0;
static std::vector<uint64_t> watched_accesses;
static std::optional<unsigned> watched_thread;

static void check_access(const void* address) {
  ++accesses;
  const uint64_t place = reinterpret_cast<uint64_t>(address);
  if (watched_thread == threadIdx.x) watched_accesses.push_back(place);
  if (place % 16 != 0) throw std::runtime_error("16 bytes at an address that is no multiple of 16");
  for (const Samples& samples : allowed) {
    if (samples.hold(place)) return;
  }
  throw std::runtime_error("16 bytes that are not within one sample");
}

template <typename T>
static void allow(const T& tensor, int64_t samples, int64_t elements) {
  if (tensor.data == nullptr) return;
  const uint64_t bytes = element_bytes(tensor.element);
  allowed.push_back({reinterpret_cast<uint64_t>(tensor.data), samples > 1 ? tensor.batch_stride * bytes : 0,
                     uint64_t(samples), elements * bytes});
}

// ---- Arguments: a dictionary with the names of StepArguments ----

struct Arguments {
  StepArguments a{};
  std::vector<Input> predictions;
};

template <typename T>
static T number(const py::dict& d, const char* name, T otherwise) {
  return d.contains(name) ? d[name].cast<T>() : otherwise;
}

template <typename T>
static T* pointer(const py::dict& d, const char* name) {
  return reinterpret_cast<T*>(number<uint64_t>(d, name, 0));
}

template <typename T>
static T tensor(const py::handle& value) {  // address, batch stride, dtype
  const auto [address, batch_stride, element] = value.cast<std::tuple<uint64_t, int64_t, int>>();
  return {reinterpret_cast<void*>(address), batch_stride, Element(element)};
}

template <typename T>
static T tensor(const py::dict& d, const char* name) {
  return d.contains(name) ? tensor<T>(d[name]) : T{};
}

static Arguments arguments_of(const py::dict& d) {
  Arguments arguments;
  for (const py::handle& value : d["predictions"]) arguments.predictions.push_back(tensor<Input>(value));
  StepArguments& a = arguments.a;
  for_each_input(a, [&](Argument name, Input& input) { input = tensor<Input>(d, name_of(name)); });
  for_each_output(a, [&](Argument name, Output& output, int) { output = tensor<Output>(d, name_of(name)); });
  a.staged_copies = number<int>(d, "staged_copies", 0);
  a.history_slots = number<int>(d, "history_slots", 0);
  a.predictions = arguments.predictions.data();
  a.num_predictions = int(arguments.predictions.size());
  a.batch = number<int64_t>(d, "batch", 0);
  a.elements_per_sample = number<int64_t>(d, "elements_per_sample", 0);
  a.rows = pointer<void>(d, "rows");
  a.steps = number<int64_t>(d, "steps", 0);
  a.weights = pointer<void>(d, "weights");
  a.weights_step_stride = number<int64_t>(d, "weights_step_stride", 0);
  a.weights_batch_stride = number<int64_t>(d, "weights_batch_stride", 0);
  a.program = pointer<int32_t>(d, "program");
  a.program_words = number<int64_t>(d, "program_words", 0);
  a.program_stride = number<int64_t>(d, "program_stride", 0);
  a.parameters = pointer<double>(d, "parameters");
  a.num_parameters = number<int>(d, "num_parameters", 0);
  a.parameters_step_stride = number<int64_t>(d, "parameters_step_stride", 0);
  a.parameters_batch_stride = number<int64_t>(d, "parameters_batch_stride", 0);
  a.made = pointer<void>(d, "made");
  a.weighs_sample = number<bool>(d, "weighs_sample", false);
  a.scratch = pointer<double>(d, "scratch");
  a.groups = number<int64_t>(d, "groups", 1);
  a.inverse_thresholds = pointer<void>(d, "inverse_thresholds");
  a.inverse_thresholds_stride = number<int64_t>(d, "inverse_thresholds_stride", 0);
  a.index = number<int64_t>(d, "index", 0);
  a.indices = pointer<int64_t>(d, "indices");
  a.indices_stride = number<int64_t>(d, "indices_stride", 0);
  a.cursor = pointer<int64_t>(d, "cursor");
  a.cursor_stride = number<int64_t>(d, "cursor_stride", 0);
  a.timestep = pointer<void>(d, "timestep");
  a.timestep_element = TimestepElement(number<int>(d, "timestep_element", 0));
  a.timestep_count = number<int64_t>(d, "timestep_count", 0);
  a.seeds = pointer<int64_t>(d, "seeds");
  a.seeds_stride = number<int64_t>(d, "seeds_stride", 0);
  a.torch_stream.seed = number<uint64_t>(d, "seed", 0);
  a.torch_stream.offset = number<uint64_t>(d, "offset", 0);
  a.torch_stream.state = pointer<int64_t>(d, "state");
  a.torch_stream.threads = number<uint32_t>(d, "threads", 0);
  a.channels = number<int64_t>(d, "channels", 1);
  few_tiles = number<int64_t>(d, "few_tiles", 1024);
  most_parts = number<int64_t>(d, "most_parts", kMostBlocks);
  step_groups = number<bool>(d, "step_groups", true);
  a.noise_kind = a.noise.data != nullptr       ? Noise::given
                 : a.seeds != nullptr          ? Noise::portable
                 : a.torch_stream.threads != 0 ? Noise::torch_stream
                                               : Noise::none;
  return arguments;
}

static void allow_all(const Arguments& arguments) {
  const StepArguments& a = arguments.a;
  allowed.clear();
  accesses = 0;
  for_each_input(a, a.predictions, [&](Argument, const Input& input) { allow(input, a.batch, a.elements_per_sample); });
  for_each_output(
      a, [&](Argument, const Output& output, int copies) { allow(output, a.batch * copies, a.elements_per_sample); });
  if (a.groups > 1) {
    allow(Output{a.scratch, a.elements_per_sample, Element::float32}, a.batch, a.elements_per_sample);
  }
}

// ---- The launch ----

struct Recorded {   // a launch that was not run
  uint64_t offset;  // of the kernel's code in this library
  unsigned blocks, threads;
  std::string parameters;
  unsigned cluster;  // the blocks of one
};
static std::vector<Recorded> recorded;
static bool records = false;

// The kinds of kernels have other parameters, and are told apart by their threads; but groups, and the backward pass,
// are one kernel each.
static_assert(kMomentThreads != kThreads && kThresholdThreads != kThreads && kThresholdThreads != kMomentThreads);

template <typename F>
static auto with_launch(const void* kernel, dim3 threads, const void* parameters, const F& f) {
  if (kernel == reinterpret_cast<const void*>(cuda::backward_kernel)) {
    return f(*static_cast<const BackwardLaunch*>(parameters));
  }
  if (kernel == reinterpret_cast<const void*>(cuda::groups_kernel)) {
    return f(*static_cast<const GroupsLaunch*>(parameters));
  }
  if (threads.x == kMomentThreads) return f(*static_cast<const MomentsLaunch*>(parameters));
  if (threads.x == kThresholdThreads) return f(*static_cast<const ThresholdsLaunch*>(parameters));
  return f(*static_cast<const Launch*>(parameters));
}

static Recorded recorded_of(const void* kernel, dim3 blocks, dim3 threads, const void* parameters) {
  Dl_info library;
  if (dladdr(&recorded, &library) == 0) throw std::runtime_error("no library holds this code");
  const uint64_t base = reinterpret_cast<uint64_t>(library.dli_fbase);
  return {reinterpret_cast<uint64_t>(kernel) - base, blocks.x, threads.x,
          with_launch(
              kernel, threads, parameters,
              [](const auto& launch) { return std::string(reinterpret_cast<const char*>(&launch), sizeof launch); }),
          1};
}

static std::mt19937_64 order;
static std::optional<std::vector<unsigned>> wanted_blocks;  // all of them unless set

static std::vector<unsigned> shuffled(std::vector<unsigned> values, size_t count) {
  std::shuffle(values.begin(), values.begin() + count, order);
  return values;
}

static std::vector<unsigned> count_to(unsigned count) {
  std::vector<unsigned> values(count);
  std::iota(values.begin(), values.end(), 0u);
  return values;
}

static cudaError_t cudaLaunchKernel(const void* kernel, dim3 blocks, dim3 threads, void** parameters, size_t,
                                    cudaStream_t) {
  if (refusal != cudaSuccess) return refusal;
  if (capture_mode != cudaStreamCaptureModeRelaxed) return cudaErrorUnknown;  // the kernel's code could not be loaded
  if (records) {
    recorded.push_back(recorded_of(kernel, blocks, threads, parameters[0]));
    return cudaSuccess;
  }
  const auto run = [&] {
    with_launch(kernel, threads, parameters[0], [&](const auto& launch) {
      using Parameters = std::decay_t<decltype(launch)>;
      reinterpret_cast<void (*)(Parameters)>(const_cast<void*>(kernel))(launch);
    });
  };
  gridDim = blocks;
  const std::vector<unsigned> chosen = wanted_blocks ? *wanted_blocks : count_to(blocks.x);
  for (const unsigned block : shuffled(chosen, chosen.size())) {
    blockIdx = dim3(block);
    std::vector<unsigned> inner = count_to(threads.x);
    std::reverse(inner.begin(), inner.end());  // thread 0 is the last
    for (const unsigned thread : shuffled(inner, inner.size() - 1)) {
      threadIdx = dim3(thread);
      run();
    }
  }
  return cudaSuccess;
}

// Blocks run one after the other here, and cannot wait for each other: a launch of clusters is recorded, but not run.
static cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* how, const void* kernel, void** parameters) {
  const unsigned cluster = how->numAttrs == 0 ? 1 : how->attrs[0].val.clusterDim.x;
  if (cluster > 1 && !records) throw std::runtime_error("clusters are not run on the host");
  const cudaError_t error =
      cudaLaunchKernel(kernel, how->gridDim, how->blockDim, parameters, how->dynamicSmemBytes, how->stream);
  if (error == cudaSuccess && records) recorded.back().cluster = cluster;
  return error;
}

// Runs the step, with blocks and threads in an order drawn from a seed; returns the number of 16-byte accesses.
static uint64_t launch(const py::dict& d, uint64_t order_seed, std::optional<std::vector<unsigned>> blocks) {
  const Arguments arguments = arguments_of(d);
  allow_all(arguments);
  order.seed(order_seed);
  wanted_blocks = std::move(blocks);
  const char* error = cuda::launch_step(arguments.a, 0, nullptr);
  if (error != nullptr) throw std::runtime_error(error);
  return accesses;
}

// Returns the launches that f would make: the kernel's place in this library, blocks, threads, and parameters.
template <typename F>
static py::list recorded_by(const F& f) {
  recorded.clear();
  records = true;
  const char* error = f();
  records = false;
  if (error != nullptr) throw std::runtime_error(error);
  py::list launches;
  for (const Recorded& each : recorded) {
    launches.append(py::make_tuple(each.offset, each.blocks, each.threads, py::bytes(each.parameters), each.cluster));
  }
  return launches;
}

// The same of a step, on a device of cuda_runtime.h.
static py::list record(const py::dict& d) {
  const Arguments arguments = arguments_of(d);
  return recorded_by([&] { return cuda::launch_step(arguments.a, number<int>(d, "device", 0), nullptr); });
}

#include "backward.h"

// Runs one block of the step; returns the addresses of one thread's accesses of 16 bytes.
static std::vector<uint64_t> accesses_of(const py::dict& d, unsigned block, unsigned thread) {
  watched_accesses.clear();
  watched_thread = thread;
  launch(d, 1, std::vector<unsigned>{block});
  watched_thread.reset();
  return watched_accesses;
}

// Returns how the launch is divided.
static py::dict grid(const py::dict& d) {
  const Arguments arguments = arguments_of(d);
  const Launch launch = make_launch(arguments.a);
  py::dict result;
  result["tiles"] = launch.tiles;
  result["tiles_per_sample"] = launch.tiles_per_sample.divisor;
  result["vector_tiles"] = launch.vector_tiles;
  result["vectors"] = launch.vectors;
  result["aligned"] = launch.aligned;
  result["torch_vectors"] = arguments.a.noise_kind == Noise::torch_stream && torch_vectors_fit(launch);
  return result;
}

// Returns which floats of the block's shared memory one thread writes in a step with one prediction.
static std::vector<int> shared_of_thread(const py::dict& d, unsigned tile, int thread) {
  const Arguments arguments = arguments_of(d);
  allow_all(arguments);
  const Launch launch = make_launch(arguments.a);
  std::vector<float> shared(kTorchValues * kVector * kThreads, NAN);
  torch_vector_tile<Variant<1, Extras::none, Noise::torch_stream, false, false>>(
      launch, launch.a.torch_stream, position_of(launch.a, 0), tile, thread, shared.data());
  std::vector<int> written;
  for (int i = 0; i < int(shared.size()); ++i) {
    if (shared[i] == shared[i]) written.push_back(i);
  }
  return written;
}

// ---- Noise, over arrays ----

static uint32_t word_of(const Philox4& r, int i) { return i == 0 ? r.x : i == 1 ? r.y : i == 2 ? r.z : r.w; }

// Names of the tensors that are read, or written, element by element.
static std::vector<std::string> input_names() {
  const StepArguments a{};
  std::vector<std::string> names;
  for_each_input(a, [&](Argument name, const Input&) { names.push_back(name_of(name)); });
  return names;
}

static std::vector<std::string> output_names() {
  const StepArguments a{};
  std::vector<std::string> names;
  for_each_output(a, [&](Argument name, const Output&, int) { names.push_back(name_of(name)); });
  return names;
}

PYBIND11_MODULE(fastguide_device_code, m) {
  m.attr("inputs") = input_names();
  m.attr("outputs") = output_names();
  m.attr("tile") = kTile;
  m.attr("threads") = kThreads;
  m.attr("max_tiles") = kMaxTiles;
  m.def("launch", &launch);
  m.def("accesses_of", &accesses_of);
  m.def("grid", &grid);
  m.def("record", &record);
  m.def("launch_backward", &launch_backward_of);
  m.def("record_backward", &record_backward);
  m.def("quotient",
        py::vectorize([](uint32_t number, uint32_t divisor) { return quotient(number, divisor_of(divisor)); }));
  m.def("refuse", [](int error) { refusal = cudaError_t(error); });
  m.def("captures_globally", [] { return capture_mode == cudaStreamCaptureModeGlobal; });
  m.def("driver_too_old", [](int version) {
    driver = version;
    return cuda::driver_too_old();
  });
  m.def("shared_of_thread", &shared_of_thread);
  m.def("philox", py::vectorize([](uint32_t x, uint32_t y, uint32_t z, uint32_t w, uint64_t key, int i) {
          return word_of(philox4x32_10({x, y, z, w}, key), i);
        }));
  // The i-th of the two words that torch makes an element of, and whether it is the first or second value of them.
  m.def("torch_word", py::vectorize([](uint64_t seed, uint64_t offset, uint64_t element, uint32_t threads, int i) {
          const TorchPosition position = torch_position(element, threads);
          return word_of(torch_call(seed, offset, position.call, position.thread), position.value / 2 * 2 + i);
        }));
  m.def("torch_value_is_second",
        py::vectorize([](uint64_t element, uint32_t threads) { return torch_position(element, threads).value % 2; }));
  m.def("torch_normal", py::vectorize([](uint64_t seed, uint64_t offset, uint64_t element, uint32_t threads) {
          return torch_normal(seed, offset, element, threads);
        }));
  m.def("torch_increment", py::vectorize(&torch_increment));
  m.def("portable_normal_of", py::vectorize([](uint64_t seed, uint32_t step, uint64_t element) {
          return portable_normal_of(seed, step, element);
        }));
  m.def("portable_normal", py::vectorize([](uint64_t seed, uint32_t step, uint64_t block, int i) {
          const Normal4 normal = portable_normal(seed, step, block);
          return i == 0 ? normal.first : i == 1 ? normal.second : i == 2 ? normal.third : normal.fourth;
        }));
  m.def("counted_place", py::vectorize([](int64_t place, int64_t channels, int64_t elements) {
          return counted_place(place, channels, elements);
        }));
}
