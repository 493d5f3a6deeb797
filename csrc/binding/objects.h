// Python's objects that repeated steps need, given once by fastguide/step/repeat.py; and who watches.
#pragma once

#include <ATen/dlpack.h>

#include "binding/python.h"

namespace fastguide {

// The fields of fastguide.step.call.Objects: the loader compares them.
#define FASTGUIDE_OBJECTS(X) \
  X(none) \
  X(true_object) \
  X(integer_type) \
  X(tensor_type) \
  X(generator_type) \
  X(sequence_types) \
  X(inpainting_type) \
  X(cpu) \
  X(requires_grad) \
  X(dtype) \
  X(version) \
  X(last_weights) \
  X(storage_offset) \
  X(device) \
  X(is_grad_enabled) \
  X(watchers) \
  X(forward_ad) \
  X(current_level) \
  X(empty_like) \
  X(new_like) \
  X(normal_) \
  X(generator) \
  X(get_state) \
  X(set_state) \
  X(count_threads) \
  X(own_thread) \
  X(frames) \
  X(locals) \
  X(waits) \
  X(exchange)

struct Objects {
#define FASTGUIDE_FIELD(name) PyObject* name = nullptr;
  FASTGUIDE_OBJECTS(FASTGUIDE_FIELD)
#undef FASTGUIDE_FIELD
  const DLPackExchangeAPI* dlpack = nullptr;
};

inline Objects python;

// Returns None, and forgets what Python has raised: the operator makes the step, or raises.
inline PyObject* nothing() {
  PyErr_Clear();
  Py_IncRef(python.none);
  return python.none;
}

// Compares a type by identity; it is borrowed, as its object is alive.
inline bool is_type_of(PyObject* type, PyObject* object) { return Reference(PyObject_Type(object)).get() == type; }

// Tells whether a value is true, or could not be had.
inline bool is_true_or_missing(const Reference& value) {
  if (value.get() != nullptr && PyObject_IsTrue(value.get()) == 0) return false;
  PyErr_Clear();
  return true;
}

// Tells whether something but torch.compile is to see the operator itself.
inline bool something_watches() {
  PyObject* const level = PyDict_GetItemWithError(python.forward_ad, python.current_level);
  if (level == nullptr || PyLong_AsLongLong(level) >= 0 || PyErr_Occurred() != nullptr) return true;
  for (std::ptrdiff_t k = 0; k < PyTuple_Size(python.watchers); ++k) {
    if (is_true_or_missing(Reference(PyObject_CallNoArgs(PyTuple_GetItem(python.watchers, k))))) return true;
  }
  return false;
}

}  // namespace fastguide
