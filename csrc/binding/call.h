// The arguments of guided_step as Python has them, read through DLPack's exchange interface, which torch offers for
// this.
#pragma once

#include <ATen/dlpack.h>

#include <vector>

#include "binding/form.h"
#include "binding/objects.h"
#include "binding/python.h"
#include "kernels/arguments.h"

namespace fastguide {

constexpr int kAllArguments = static_cast<int>(Argument::history) + 1;
// Below this may lie a view of freed memory, which points as far from null as it begins.
constexpr uint64_t kLeastAddress = uint64_t{1} << 44;

constexpr uint32_t bit(Argument argument) { return uint32_t{1} << static_cast<int>(argument); }

// The arguments of guided_step, in its order, but the table: fastguide.step.call.Call, which the loader compares.
#define FASTGUIDE_CALL(X) \
  X(index) \
  X(sample) \
  X(predictions) \
  X(guidance) \
  X(gradient) \
  X(variance) \
  X(noise) \
  X(generator) \
  X(seeds) \
  X(inpainting) \
  X(history) \
  X(anchor) \
  X(original) \
  X(out) \
  X(staged) \
  X(backend)

enum class Given : int {
#define FASTGUIDE_ENUMERATOR(name) name,
  FASTGUIDE_CALL(FASTGUIDE_ENUMERATOR)
#undef FASTGUIDE_ENUMERATOR
      count
};

// What a step that was planned depends on but its tensors: fastguide.step.call.Facts, which the loader compares.
#define FASTGUIDE_FACTS(X) \
  X(kinds_of) \
  X(token) \
  X(guidance) \
  X(scale) \
  X(options) \
  X(dtype) \
  X(names) \
  X(values) \
  X(tensors) \
  X(versions)

enum class Fact : int {
#define FASTGUIDE_ENUMERATOR(name) name,
  FASTGUIDE_FACTS(FASTGUIDE_ENUMERATOR)
#undef FASTGUIDE_ENUMERATOR
};

// The tensors of a call, read; and who else takes part in it.
struct Call {
  explicit Call(PyObject* const* given) : objects(given) {}

  PyObject* const* objects;
  bool grad_enabled = false;
  uint32_t present = 0;  // a bit for each argument that is a tensor
  DLTensor tensors[kAllArguments];
  std::vector<DLTensor> predictions;
  std::vector<Reference> kept;  // of lists, from which another thread may take them
  int64_t index = -1;
  bool by_integer = false;

  PyObject* object(Given name) const { return objects[static_cast<int>(name)]; }
  const DLTensor& tensor(Argument name) const { return tensors[static_cast<int>(name)]; }

  // Reads a tensor; false: it is none, or one that only the operator understands.
  bool read_tensor(PyObject* object, DLTensor* tensor) const {
    if (!is_type_of(python.tensor_type, object)) return false;
    if (grad_enabled && is_true_or_missing(Reference(PyObject_GetAttr(object, python.requires_grad)))) return false;
    return read_memory(object, tensor);
  }

  // Reads a tensor that needs no grad; false: it has no memory, or it is not plain memory.
  static bool read_memory(PyObject* object, DLTensor* tensor) {
    if (python.dlpack->dltensor_from_py_object_no_sync(object, tensor) != 0 || tensor->ndim > kMostDimensions) {
      PyErr_Clear();
      return false;
    }
    const uint64_t address = reinterpret_cast<uint64_t>(tensor->data);
    if (address >= kLeastAddress) return true;
    const Reference offset(PyObject_CallFunctionObjArgs(python.storage_offset, object, nullptr));
    const long long elements = offset.get() == nullptr ? -1 : PyLong_AsLongLong(offset.get());
    PyErr_Clear();
    return elements >= 0 && address != static_cast<uint64_t>(elements) * (tensor->dtype.bits / 8);
  }

  bool read_argument(PyObject* object, Argument name) {
    if (object == python.none) return true;
    present |= bit(name);
    return read_tensor(object, &tensors[static_cast<int>(name)]);
  }

  bool read_predictions(PyObject* object) {
    const Reference type(PyObject_Type(object));
    if (type.get() == python.tensor_type) {
      predictions.emplace_back();
      return read_tensor(object, &predictions.back());
    }
    bool sequence = false;
    for (std::ptrdiff_t k = 0; k < PyTuple_Size(python.sequence_types); ++k) {
      sequence = sequence || PyTuple_GetItem(python.sequence_types, k) == type.get();
    }
    const std::ptrdiff_t count = sequence ? PySequence_Size(object) : 0;
    if (count <= 0) return false;
    predictions.reserve(count);
    kept.reserve(count + 3);
    for (std::ptrdiff_t k = 0; k < count; ++k) {
      kept.emplace_back(PySequence_GetItem(object, k));
      predictions.emplace_back();
      if (kept.back().get() == nullptr || !read_tensor(kept.back().get(), &predictions.back())) return false;
    }
    return true;
  }

  bool read_inpainting(PyObject* object) {
    if (object == python.none) return true;
    if (!is_type_of(python.inpainting_type, object)) return false;
    const Argument names[] = {Argument::mask, Argument::known, Argument::known_noise};
    for (int k = 0; k < 3; ++k) {
      kept.emplace_back(PySequence_GetItem(object, k));
      if (kept.back().get() == nullptr || !read_argument(kept.back().get(), names[k])) return false;
    }
    return true;
  }

  bool read_index(PyObject* object) {
    const Reference type(PyObject_Type(object));
    if (type.get() == python.tensor_type) return read_argument(object, Argument::indices);
    by_integer = type.get() == python.integer_type;
    if (by_integer) index = PyLong_AsLongLong(object);
    return !by_integer || index >= 0;  // -1 if it has too many bits; another object may be a cursor
  }

  bool read() {
    grad_enabled = is_true_or_missing(Reference(PyObject_CallNoArgs(python.is_grad_enabled)));
    return read_argument(object(Given::sample), Argument::sample) && (present & bit(Argument::sample)) != 0 &&
           read_predictions(object(Given::predictions)) && read_index(object(Given::index)) &&
           read_argument(object(Given::gradient), Argument::gradient) &&
           read_argument(object(Given::variance), Argument::variance) &&
           read_argument(object(Given::noise), Argument::noise) &&
           read_argument(object(Given::seeds), Argument::seeds) && read_inpainting(object(Given::inpainting)) &&
           read_argument(object(Given::history), Argument::history) &&
           read_argument(object(Given::anchor), Argument::anchor) &&
           read_argument(object(Given::original), Argument::original) &&
           read_argument(object(Given::out), Argument::out) && read_argument(object(Given::staged), Argument::staged);
  }
};

}  // namespace fastguide
