// The functions of Python's stable C API that repeated steps call.
//
// They are declared here, and weak, rather than by Python.h: so the library is built without Python's headers, is one
// for all versions of Python, and can be loaded by programs that are not Python.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

struct PyObject;       // opaque: its layout is of each build of Python
struct PyThreadState;  // opaque

extern "C" {

// https://docs.python.org/3/c-api/structures.html#c.PyMethodDef
struct PyMethodDef {
  const char* name;
  PyObject* (*function)(PyObject* self, PyObject* const* arguments, std::ptrdiff_t count);
  int flags;
  const char* documentation;
};

#define FASTGUIDE_PYTHON __attribute__((weak))
FASTGUIDE_PYTHON void Py_IncRef(PyObject* object);
FASTGUIDE_PYTHON void Py_DecRef(PyObject* object);
FASTGUIDE_PYTHON extern PyObject* PyExc_RuntimeError;
FASTGUIDE_PYTHON extern PyObject* PyExc_TypeError;
FASTGUIDE_PYTHON void PyErr_Clear();
FASTGUIDE_PYTHON void PyErr_SetString(PyObject* kind, const char* message);
FASTGUIDE_PYTHON PyObject* PyErr_Occurred();
FASTGUIDE_PYTHON PyObject* PyObject_Type(PyObject* object);
FASTGUIDE_PYTHON PyObject* PyObject_GetAttr(PyObject* object, PyObject* name);
FASTGUIDE_PYTHON int PyObject_SetAttr(PyObject* object, PyObject* name, PyObject* value);
FASTGUIDE_PYTHON int PyObject_IsTrue(PyObject* object);
FASTGUIDE_PYTHON int PyObject_RichCompareBool(PyObject* first, PyObject* second, int operation);
FASTGUIDE_PYTHON PyObject* PyObject_CallFunctionObjArgs(PyObject* callable, ...);
FASTGUIDE_PYTHON PyObject* PyObject_CallNoArgs(PyObject* callable);
FASTGUIDE_PYTHON PyObject* PyObject_Call(PyObject* callable, PyObject* tuple, PyObject* keywords);
FASTGUIDE_PYTHON PyObject* PyObject_CallObject(PyObject* callable, PyObject* tuple);
FASTGUIDE_PYTHON std::ptrdiff_t PySequence_Size(PyObject* sequence);
FASTGUIDE_PYTHON PyObject* PySequence_GetItem(PyObject* sequence, std::ptrdiff_t index);
FASTGUIDE_PYTHON std::ptrdiff_t PyTuple_Size(PyObject* tuple);
FASTGUIDE_PYTHON PyObject* PyTuple_GetItem(PyObject* tuple, std::ptrdiff_t index);  // borrowed
FASTGUIDE_PYTHON PyObject* PyTuple_New(std::ptrdiff_t size);
FASTGUIDE_PYTHON int PyTuple_SetItem(PyObject* tuple, std::ptrdiff_t index, PyObject* object);  // takes the reference
FASTGUIDE_PYTHON PyObject* PyDict_New();
FASTGUIDE_PYTHON PyObject* PyDict_GetItemWithError(PyObject* dictionary, PyObject* key);  // borrowed
FASTGUIDE_PYTHON int PyDict_SetItem(PyObject* dictionary, PyObject* key, PyObject* value);
FASTGUIDE_PYTHON std::ptrdiff_t PyDict_Size(PyObject* dictionary);
FASTGUIDE_PYTHON int PyDict_Next(PyObject* dictionary, std::ptrdiff_t* place, PyObject** key,
                                 PyObject** value);  // both borrowed
FASTGUIDE_PYTHON std::ptrdiff_t PyBytes_Size(PyObject* bytes);
FASTGUIDE_PYTHON char* PyBytes_AsString(PyObject* bytes);
FASTGUIDE_PYTHON PyObject* PyBytes_FromStringAndSize(const char* bytes, std::ptrdiff_t size);
FASTGUIDE_PYTHON long long PyLong_AsLongLong(PyObject* integer);
FASTGUIDE_PYTHON void* PyCapsule_GetPointer(PyObject* capsule, const char* name);
FASTGUIDE_PYTHON PyObject* PyFrame_GetCode(PyObject* frame);
FASTGUIDE_PYTHON PyObject* PyObject_GetItem(PyObject* container, PyObject* key);
FASTGUIDE_PYTHON int PyGC_Disable();
FASTGUIDE_PYTHON int PyGC_Enable();
FASTGUIDE_PYTHON PyThreadState* PyEval_SaveThread();
FASTGUIDE_PYTHON void PyEval_RestoreThread(PyThreadState* state);
#undef FASTGUIDE_PYTHON

}  // extern "C"

namespace fastguide {

constexpr int kFastCall = 0x0080;  // METH_FASTCALL: arguments by position, as an array
constexpr int kEqual = 2;          // Py_EQ

// Keeps a Python object alive: a new reference, which it takes over; or null.
class Reference {
 public:
  explicit Reference(PyObject* object = nullptr) : object_(object) {}
  Reference(Reference&& other) noexcept : object_(other.object_) { other.object_ = nullptr; }
  Reference(const Reference&) = delete;
  Reference& operator=(const Reference&) = delete;
  Reference& operator=(Reference&& other) noexcept {
    std::swap(object_, other.object_);
    return *this;
  }
  ~Reference() {
    if (object_ != nullptr) Py_DecRef(object_);
  }
  PyObject* get() const { return object_; }
  PyObject* release() {
    PyObject* object = object_;
    object_ = nullptr;
    return object;
  }

 private:
  PyObject* object_;
};

// Lets other threads of Python run as long as it lives.
class OtherThreads {
 public:
  explicit OtherThreads(bool run) : state_(run ? PyEval_SaveThread() : nullptr) {}
  OtherThreads(const OtherThreads&) = delete;
  OtherThreads& operator=(const OtherThreads&) = delete;
  ~OtherThreads() {
    if (state_ != nullptr) PyEval_RestoreThread(state_);
  }

 private:
  PyThreadState* state_;
};

// Keeps the collector of garbage from running, and with it code of Python.
class NoCollector {
 public:
  NoCollector() : was_on_(PyGC_Disable() == 1) {}
  NoCollector(const NoCollector&) = delete;
  NoCollector& operator=(const NoCollector&) = delete;
  ~NoCollector() {
    if (was_on_) PyGC_Enable();
  }

 private:
  bool was_on_;
};

}  // namespace fastguide
