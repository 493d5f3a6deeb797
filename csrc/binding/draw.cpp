// Draws a generator's normal values: by the library where torch's bits are known, and otherwise by torch.
//
// The library gets a generator's state as bytes and sets it again. torch draws under the generator's lock, which only
// torch can take: so nobody else may draw between the two. No thread of Python does where all others wait: this one
// keeps Python's lock, and none of them has given it up inside of torch.
#include "binding/draw.h"

#include "binding/torch_stream.h"

namespace fastguide {
namespace {

bool trusted = false;

// Returns the number of elements of memory that is contiguous, of float32, and of the CPU; otherwise -1.
int64_t plain_elements(const DLTensor& memory) {
  if (memory.device.device_type != kDLCPU || memory.dtype.code != kDLFloat || memory.dtype.bits != 32) return -1;
  int64_t expected = 1;
  for (int k = memory.ndim - 1; k >= 0; --k) {
    if (memory.shape[k] != 1 && memory.strides != nullptr && memory.strides[k] != expected) return -1;
    expected *= memory.shape[k];
  }
  return expected;
}

bool is_cpu_generator(PyObject* generator) {
  if (!is_type_of(python.generator_type, generator)) return false;
  const Reference device(PyObject_GetAttr(generator, python.device));
  return device.get() != nullptr && PyObject_RichCompareBool(device.get(), python.cpu, kEqual) == 1;
}

// Tells whether a thread of this innermost frame waits: the function is one of those that only wait, and the variable
// of it that could be another function of C is None.
bool is_wait(PyObject* frame) {
  const Reference code(PyFrame_GetCode(frame));
  const std::ptrdiff_t count = PySequence_Size(python.waits);
  for (std::ptrdiff_t k = 0; k < count; ++k) {
    const Reference wait(PySequence_GetItem(python.waits, k));
    if (PyTuple_GetItem(wait.get(), 0) != code.get()) continue;
    PyObject* const name = PyTuple_GetItem(wait.get(), 1);
    if (name == python.none) return true;
    const Reference variables(PyObject_GetAttr(frame, python.locals));
    return variables.get() != nullptr && Reference(PyObject_GetItem(variables.get(), name)).get() == python.none;
  }
  return false;
}

// Tells whether each other thread of Python waits. No code of Python runs once the frames are there, so that they go on
// waiting until this thread gives up Python's lock: what is called below is of C, and tells no audit hook.
bool others_wait() {
  const Reference frames(PyObject_CallNoArgs(python.frames)), number(PyObject_CallNoArgs(python.count_threads));
  const Reference own(PyObject_CallNoArgs(python.own_thread));
  if (frames.get() == nullptr || number.get() == nullptr || own.get() == nullptr) return false;
  // A thread that executes a function of C alone has no frame. The number is of those beside the main one that Python
  // has started: one of another language's, where it has a frame, can make up for such a thread.
  if (PyDict_Size(frames.get()) <= PyLong_AsLongLong(number.get())) return false;
  PyObject *thread, *frame;
  for (std::ptrdiff_t place = 0; PyDict_Next(frames.get(), &place, &thread, &frame) != 0;) {
    if (PyObject_RichCompareBool(thread, own.get(), kEqual) != 1 && !is_wait(frame)) return false;
  }
  return true;
}

// Draws by the library; false: nothing is done, but perhaps to the values.
bool draw_here(PyObject* generator, bool is_own, float* to, int64_t count) {
  const NoCollector none;
  if (!is_own && !others_wait()) return false;
  const Reference state(PyObject_CallFunctionObjArgs(python.get_state, generator, nullptr));
  DLTensor bytes;
  if (state.get() == nullptr || !Call::read_memory(state.get(), &bytes)) return false;
  if (bytes.ndim != 1 || bytes.shape[0] != kStateBytes || bytes.dtype.bits != 8) return false;
  if (!draw_torch_stream(const_cast<void*>(pointer_of(bytes)), to, count)) return false;
  return Reference(PyObject_CallFunctionObjArgs(python.set_state, generator, state.get(), nullptr)).get() != nullptr;
}

PyObject* true_or_nothing(bool value) {
  if (!value) return nothing();
  Py_IncRef(python.true_object);
  return python.true_object;
}

bool draw_by_torch(PyObject* tensor, PyObject* generator) {
  const Reference arguments(PyTuple_New(1)), keywords(PyDict_New());
  if (arguments.get() == nullptr || keywords.get() == nullptr) return false;
  Py_IncRef(tensor);
  PyTuple_SetItem(arguments.get(), 0, tensor);
  if (PyDict_SetItem(keywords.get(), python.generator, generator) != 0) return false;
  return Reference(PyObject_Call(python.normal_, arguments.get(), keywords.get())).get() != nullptr;
}

}  // namespace

bool draw(PyObject* tensor, const DLTensor& memory, PyObject* generator) {
  const int64_t count = trusted ? plain_elements(memory) : -1;
  if (count > 0) {
    if (draw_here(generator, false, static_cast<float*>(const_cast<void*>(pointer_of(memory))), count)) return true;
    PyErr_Clear();
  }
  return draw_by_torch(tensor, generator);
}

PyObject* fill_normals(PyObject*, PyObject* const* objects, std::ptrdiff_t count) {
  DLTensor memory;
  if (count != 3 || !is_type_of(python.tensor_type, objects[0]) || !is_cpu_generator(objects[1])) return nothing();
  if (is_true_or_missing(Reference(PyObject_GetAttr(objects[0], python.requires_grad)))) return nothing();
  if (!Call::read_memory(objects[0], &memory)) return nothing();
  const int64_t elements = plain_elements(memory);
  if (elements <= 0) return nothing();
  float* const to = static_cast<float*>(const_cast<void*>(pointer_of(memory)));
  return true_or_nothing(draw_here(objects[1], PyObject_IsTrue(objects[2]) == 1, to, elements));
}

PyObject* pass_normals(PyObject*, PyObject* const* objects, std::ptrdiff_t count) {
  const int64_t elements = count == 3 && is_cpu_generator(objects[0]) ? PyLong_AsLongLong(objects[1]) : -1;
  if (elements <= 0) return nothing();
  return true_or_nothing(draw_here(objects[0], PyObject_IsTrue(objects[2]) == 1, nullptr, elements));
}

PyObject* trust_draws(PyObject*, PyObject* const* objects, std::ptrdiff_t count) {
  trusted = count == 1 && PyObject_IsTrue(objects[0]) == 1;
  return nothing();
}

}  // namespace fastguide
