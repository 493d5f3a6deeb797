// Makes a step of a known kind again, from the Python objects that guided_step got: without Python's checks, but
// those that can fail again, and torch's dispatcher.
//
// fastguide/step/repeat.py says when, and keeps the kinds. Whatever is not as it was makes `repeat` return None, having
// done nothing.
#include <algorithm>
#include <cstdio>
#include <exception>
#include <iterator>
#include <utility>
#include <vector>

#include "binding/call.h"
#include "binding/draw.h"
#include "binding/form.h"
#include "binding/objects.h"
#include "binding/python.h"
#include "binding/record.h"
#include "binding/run.h"
#include "kernels/arguments.h"

namespace fastguide {
namespace {

// ---- A kind ----

enum class NewOutput : int { no, small, any };

// The bytes of a kind: this, the predictions' forms, and the predictions as the record has them.
struct Kind {
  // Compared by identity: Python keeps them alive. cursor: null if the index is an integer or a tensor.
  const PyObject *guidance, *cursor, *backend;
  PyObject* launch;               // makes the step, of a call's objects; null: the record does
  PyObject *weights_from, *made;  // whose last_weights are what the step has made; null: it makes none
  bool by_integer;
  char row;  // of the table's rows, which this kind's are like; see `repeat`
  bool takes_generator;
  NewOutput new_output;
  bool draws;  // whether the generator draws the noise; otherwise it is only there
  uint32_t present;
  int64_t tensors;  // of predictions
  Form forms[kAllArguments];
  Record record;

  const Form* prediction_forms() const { return reinterpret_cast<const Form*>(this + 1); }
  const Input* predictions() const { return reinterpret_cast<const Input*>(prediction_forms() + tensors); }
  const Form& form(Argument name) const { return forms[static_cast<int>(name)]; }
};

static_assert(sizeof(Kind) % alignof(Kind) == 0 && sizeof(Form) % alignof(Input) == 0, "they lie behind each other");

bool takes_part(const Call& call, const Kind& kind, const char* rows, int64_t count) {
  if (call.by_integer != kind.by_integer) return false;
  if (kind.by_integer && (call.index >= count || rows[call.index] != kind.row)) return false;
  if (kind.cursor != nullptr &&
      (call.object(Given::index) != kind.cursor || call.object(Given::out) != call.object(Given::sample))) {
    return false;
  }
  PyObject* const generator = call.object(Given::generator);
  if (kind.takes_generator != (generator != python.none)) return false;
  if (!kind.takes_generator) return true;
  if (!is_type_of(python.generator_type, generator)) return false;
  const Reference device(PyObject_GetAttr(generator, python.device));
  const bool is_cpu = device.get() != nullptr && PyObject_RichCompareBool(device.get(), python.cpu, kEqual) == 1;
  PyErr_Clear();
  return is_cpu;
}

bool fits(const Call& call, const Kind& kind) {
  if (kind.present != call.present || kind.guidance != call.object(Given::guidance) ||
      kind.backend != call.object(Given::backend) || kind.tensors != static_cast<int64_t>(call.predictions.size())) {
    return false;
  }
  if (kind.cursor == nullptr && !kind.by_integer && (kind.present & bit(Argument::indices)) == 0) return false;
  const bool alignment = kind.launch != nullptr;
  for (int k = 0; k < kAllArguments; ++k) {
    if ((kind.present >> k & 1) != 0 && !kind.forms[k].is_form_of(call.tensors[k], alignment)) return false;
  }
  for (int64_t k = 0; k < kind.tensors; ++k) {
    if (!kind.prediction_forms()[k].is_form_of(call.predictions[k], alignment)) return false;
  }
  return true;
}

// Raises a TypeError: a function was given another number of objects.
PyObject* refuse(const char* function, std::ptrdiff_t expected, std::ptrdiff_t got) {
  char message[80];
  std::snprintf(message, sizeof message, "%s: expected %td objects, got %td", function, expected, got);
  PyErr_SetString(PyExc_TypeError, message);
  return nullptr;
}

// ---- repeat ----

// Puts a call's pointers where a record had those of the first one. predictions: memory for as many as there are.
void fill(const Call& call, const Kind& kind, StepArguments* a, Input* predictions) {
  for_each_pointer(*a, [&](Argument name, const void** pointer) {
    if ((call.present & bit(name)) != 0) *pointer = pointer_of(call.tensor(name));
  });
  const Input* const inputs = kind.predictions();
  std::copy(inputs, inputs + a->num_predictions, predictions);
  for (int k = 0; k < a->num_predictions; ++k) {
    Input& input = predictions[k];
    input.data = kind.record.prediction_bytes != 0
                     ? static_cast<const char*>(pointer_of(call.predictions[0])) + k * kind.record.prediction_bytes
                     : pointer_of(call.predictions[k]);
  }
  a->predictions = predictions;
  if (call.by_integer) a->index = call.index;
}

// Makes a tensor like the sample with `make`, and reads it; null: it has raised, or the tensor is not of that form.
Reference new_tensor(PyObject* make, const Call& call, const Kind& kind, Argument name, DLTensor* tensor) {
  Reference made(PyObject_CallFunctionObjArgs(make, call.object(Given::sample), nullptr));
  if (made.get() == nullptr) return made;
  const bool same =
      Call::read_memory(made.get(), tensor) && kind.form(name).is_form_of(*tensor, kind.launch != nullptr);
  return same ? std::move(made) : Reference();
}

// Raises what Python has raised; otherwise leaves the step to the operator.
PyObject* raise_or_nothing() { return PyErr_Occurred() != nullptr ? nullptr : nothing(); }

// Calls the kind's launch(out, noise, index, sample, ...); false: it has raised.
bool launch(const Kind& kind, const Call& call, PyObject* out, PyObject* noise) {
  constexpr int kCount = static_cast<int>(Given::count);
  const Reference arguments(PyTuple_New(kCount + 2));
  for (int k = 0; arguments.get() != nullptr && k < kCount + 2; ++k) {
    PyObject* const object = k == 0 ? out : k == 1 ? noise : call.objects[k - 2];
    Py_IncRef(object);
    PyTuple_SetItem(arguments.get(), k, object);  // takes the reference
  }
  return Reference(arguments.get() == nullptr ? nullptr : PyObject_CallObject(kind.launch, arguments.get())).get() !=
         nullptr;
}

// Tells whether the output shares no byte with what is still to be read, so that noise can be drawn into it.
bool out_is_free(const StepArguments& a) {
  const auto begin_of = [](const void* data) { return reinterpret_cast<uint64_t>(data); };
  const auto end_of = [&](const void* data, int64_t batch_stride, Element element) {
    const int64_t last = (a.batch - 1) * batch_stride + a.elements_per_sample;
    return begin_of(data) + static_cast<uint64_t>(last * element_bytes(element));
  };
  const uint64_t begin = begin_of(a.out.data), end = end_of(a.out.data, a.out.batch_stride, a.out.element);
  bool free = true;
  for_each_input(a, a.predictions, [&](Argument, const Input& input) {
    if (input.data == nullptr) return;
    free = free && (end_of(input.data, input.batch_stride, input.element) <= begin || end <= begin_of(input.data));
  });
  return free;
}

PyObject* make_step(Call& call, const Kind& kind) {
  Reference out, noise;
  if (kind.new_output == NewOutput::no) {
    Py_IncRef(call.object(Given::out));
    out = Reference(call.object(Given::out));
  } else {
    PyObject* const make = kind.new_output == NewOutput::small ? python.empty_like : python.new_like;
    out = new_tensor(make, call, kind, Argument::out, &call.tensors[static_cast<int>(Argument::out)]);
    if (out.get() == nullptr) return raise_or_nothing();
    call.present |= bit(Argument::out);
  }
  StepArguments a = kind.record.arguments;
  Input few[4];
  std::vector<Input> many(a.num_predictions > static_cast<int>(std::size(few)) ? size_t(a.num_predictions) : 0);
  fill(call, kind, &a, many.empty() ? few : many.data());
  PyObject* z = call.object(Given::noise);
  DLTensor drawn{};
  if (kind.draws) {
    a.noise.data = nullptr;
    drawn = call.tensor(Argument::out);
    z = out.get();
    if (!out_is_free(a) || !kind.form(Argument::noise).is_form_of(drawn, kind.launch != nullptr)) {
      noise = new_tensor(python.new_like, call, kind, Argument::noise, &drawn);
      if (noise.get() == nullptr) return raise_or_nothing();
      z = noise.get();
    }
    a.noise.data = pointer_of(drawn);
  }
  try {
    check(a, kind.record.is_cpu);
  } catch (const std::exception&) {
    return nothing();  // the operator says why
  }
  if (kind.draws && !draw(z, drawn, call.object(Given::generator))) return nullptr;
  if (kind.weights_from != nullptr) PyObject_SetAttr(kind.weights_from, python.last_weights, kind.made);
  if (kind.launch != nullptr) return launch(kind, call, out.get(), z) ? out.release() : nullptr;
  try {
    const OtherThreads others(!kind.record.is_cpu || a.batch * a.elements_per_sample >= kGrain);
    run(a, kind.record.is_cpu, kind.record.device);
  } catch (const std::exception&) {
    // A GPU has refused the launch, before which nothing was drawn; on the CPU, a part may be written
    if (!kind.record.is_cpu) return nothing();
    PyErr_SetString(PyExc_RuntimeError, "guided_step: the CPU's threads could not be run");
    return nullptr;
  }
  return out.release();
}

// Makes a step of one of a table's kinds; None: it is of none of them.
PyObject* repeat_one_of(PyObject* kinds, PyObject* const* objects) {
  Call call(objects);
  if (something_watches() || !call.read()) return nothing();
  PyObject* const rows = PyTuple_GetItem(kinds, 0);
  const std::ptrdiff_t count = PyTuple_Size(kinds);
  for (std::ptrdiff_t k = 1; k < count; ++k) {
    const Kind& kind = *reinterpret_cast<const Kind*>(PyBytes_AsString(PyTuple_GetItem(PyTuple_GetItem(kinds, k), 0)));
    if (fits(call, kind) && takes_part(call, kind, PyBytes_AsString(rows), PyBytes_Size(rows))) {
      return make_step(call, kind);
    }
  }
  return nothing();
}

// repeat(kinds, index, sample, ...), as guided_step's arguments: the step's output, or None.
//
// kinds: a tuple. First come bytes, one for each row of the table: kinds of one and the same byte are for that row.
// Each other entry is a tuple that begins with a kind's bytes, and keeps alive what they point to.
PyObject* repeat(PyObject*, PyObject* const* objects, std::ptrdiff_t count) {
  constexpr std::ptrdiff_t kObjects = static_cast<std::ptrdiff_t>(Given::count) + 1;
  if (count != kObjects) return refuse("repeat", kObjects, count);
  return repeat_one_of(objects[0], objects + 1);
}

// ---- follow ----

PyObject* fact(PyObject* facts, Fact name) { return PyTuple_GetItem(facts, static_cast<int>(name)); }

bool are_equal(PyObject* one, PyObject* other) {
  if (one == other) return true;
  const Reference type(PyObject_Type(one)), other_type(PyObject_Type(other));
  return type.get() == other_type.get() && PyObject_RichCompareBool(one, other, kEqual) == 1;
}

// Tells whether a tensor has been written to that often.
bool is_of_version(PyObject* tensor, PyObject* version) {
  const Reference found(PyObject_GetAttr(tensor, python.version));
  return found.get() != nullptr && PyObject_RichCompareBool(found.get(), version, kEqual) == 1;
}

// Tells whether a tensor has a dtype; None: it may have any that a kind has.
bool is_of_dtype(PyObject* tensor, PyObject* dtype) {
  return dtype == python.none || Reference(PyObject_GetAttr(tensor, python.dtype)).get() == dtype;
}

// Tells whether entries of a dictionary are the very objects that they were, and tensors as they were.
bool are_unchanged(PyObject* facts, PyObject* own) {
  PyObject* const names = fact(facts, Fact::names);
  for (std::ptrdiff_t k = 0; k < PyTuple_Size(names); ++k) {
    PyObject* const found = PyDict_GetItemWithError(own, PyTuple_GetItem(names, k));
    if (found == nullptr || found != PyTuple_GetItem(fact(facts, Fact::values), k)) return false;
  }
  PyObject* const tensors = fact(facts, Fact::tensors);
  for (std::ptrdiff_t k = 0; k < PyTuple_Size(tensors); ++k) {
    if (!is_of_version(PyTuple_GetItem(tensors, k), PyTuple_GetItem(fact(facts, Fact::versions), k))) return false;
  }
  return true;
}

// follow(facts, own, options, scale, output, index, sample, version, predictions, generator, history, out, staged):
// makes a step like the last one, if its facts hold; otherwise None.
//
// own: the dictionary of `names`. output: has the `dtype`. version: the sample's. The others: as guided_step's.
PyObject* follow(PyObject*, PyObject* const* objects, std::ptrdiff_t count) {
  constexpr std::ptrdiff_t kObjects = 13;
  if (count != kObjects) return refuse("follow", kObjects, count);
  PyObject *const facts = objects[0], *const sample = objects[6];
  const bool same = are_equal(objects[2], fact(facts, Fact::options)) &&
                    are_equal(objects[3], fact(facts, Fact::scale)) && is_of_version(sample, objects[7]) &&
                    is_of_dtype(objects[4], fact(facts, Fact::dtype)) && are_unchanged(facts, objects[1]);
  PyObject* const found =
      same ? PyDict_GetItemWithError(fact(facts, Fact::kinds_of), fact(facts, Fact::token)) : nullptr;
  if (found == nullptr) return nothing();
  Py_IncRef(found);  // another thread may forget it
  const Reference kinds(found);
  PyObject* call[static_cast<int>(Given::count)];
  std::fill(std::begin(call), std::end(call), python.none);
  const auto give = [&call](Given name, PyObject* object) { call[static_cast<int>(name)] = object; };
  give(Given::index, objects[5]);
  give(Given::sample, sample);
  give(Given::predictions, objects[8]);
  give(Given::guidance, fact(facts, Fact::guidance));
  give(Given::generator, objects[9]);
  give(Given::history, objects[10]);
  give(Given::out, objects[11]);
  give(Given::staged, objects[12]);
  return repeat_one_of(kinds.get(), call);
}

// ---- describe ----

// Tells whether a record has the tensors of a call, and no others: then other tensors of the same forms may take their
// places.
bool is_of_call(const Call& call, const Record& record, const Input* inputs, bool draws) {
  StepArguments a = record.arguments;
  bool same = true;
  for_each_pointer(a, [&](Argument name, const void** pointer) {
    if (name == Argument::noise && draws) return;
    const bool given = (call.present & bit(name)) != 0;
    same = same && (*pointer != nullptr) == given && (!given || *pointer == pointer_of(call.tensor(name)));
  });
  const bool stacked = record.prediction_bytes != 0;
  same = same &&
         (stacked ? call.predictions.size() == 1 : call.predictions.size() == static_cast<size_t>(a.num_predictions));
  for (size_t k = 0; same && k < call.predictions.size(); ++k) {
    same = inputs[k].data == pointer_of(call.predictions[k]);
  }
  return same;
}

// describe(record, row, by_cursor, new_output, draws, noise, launch, weights_from, made, index, sample, ...): the bytes
// of the kind of a step that was made; None: steps like it are not repeated.
//
// record: bytes from fastguide::record_step. row: the byte of its row, of no meaning without an integer. out: that of
// the step, even where it was new. noise: what was drawn, or None.
PyObject* describe(PyObject*, PyObject* const* objects, std::ptrdiff_t count) {
  constexpr int kOwn = 9;
  constexpr std::ptrdiff_t kObjects = static_cast<std::ptrdiff_t>(Given::count) + kOwn;
  if (count != kObjects) return refuse("describe", kObjects, count);
  Call call(objects + kOwn);
  if (!call.read()) return nothing();
  const char* const memory = PyBytes_AsString(objects[0]);
  const Record& record = *reinterpret_cast<const Record*>(memory);
  const Input* const inputs = reinterpret_cast<const Input*>(memory + sizeof(Record));
  // An element alone may be the imaginary part of a conjugate, whose sign only the dispatcher knows; no other public
  // function of torch returns real tensors of that kind
  if (record.arguments.elements_per_sample <= 1) return nothing();
  Kind kind{};
  kind.guidance = call.object(Given::guidance);
  kind.backend = call.object(Given::backend);
  kind.cursor = PyObject_IsTrue(objects[2]) == 1 ? call.object(Given::index) : nullptr;
  kind.launch = objects[6] == python.none ? nullptr : objects[6];
  kind.weights_from = objects[7] == python.none ? nullptr : objects[7];
  kind.made = objects[8];
  kind.by_integer = call.by_integer;
  kind.row = static_cast<char>(PyLong_AsLongLong(objects[1]));
  kind.takes_generator = call.object(Given::generator) != python.none;
  kind.new_output = static_cast<NewOutput>(PyLong_AsLongLong(objects[3]));
  kind.draws = PyObject_IsTrue(objects[4]) == 1;
  if (PyErr_Occurred() != nullptr || !is_of_call(call, record, inputs, kind.draws)) return nothing();
  for (int k = 0; k < kAllArguments; ++k) {
    if ((call.present >> k & 1) != 0) kind.forms[k] = Form::of(call.tensors[k]);
  }
  if (kind.draws) {
    DLTensor noise;
    if (!call.read_tensor(objects[5], &noise)) return nothing();
    kind.forms[static_cast<int>(Argument::noise)] = Form::of(noise);
  }
  kind.present = call.present;
  if (kind.new_output != NewOutput::no) kind.present &= ~bit(Argument::out);
  kind.tensors = static_cast<int64_t>(call.predictions.size());
  kind.record = record;
  std::vector<char> bytes(reinterpret_cast<const char*>(&kind), reinterpret_cast<const char*>(&kind + 1));
  const auto append = [&bytes](const auto* values, size_t number) {
    const char* const begin = reinterpret_cast<const char*>(values);
    bytes.insert(bytes.end(), begin, begin + number * sizeof *values);
  };
  for (const DLTensor& tensor : call.predictions) {
    const Form form = Form::of(tensor);
    append(&form, 1);
  }
  append(inputs, static_cast<size_t>(record.arguments.num_predictions));
  return PyBytes_FromStringAndSize(bytes.data(), static_cast<std::ptrdiff_t>(bytes.size()));
}

// ---- is_watched and attach ----

PyObject* true_or_none(bool value) {
  PyObject* const object = value ? python.true_object : python.none;
  PyErr_Clear();
  Py_IncRef(object);
  return object;
}

// is_watched(): True, if something but torch.compile is to see the operator; otherwise None.
PyObject* is_watched(PyObject*, PyObject* const*, std::ptrdiff_t) { return true_or_none(something_watches()); }

// attach(none, integer_type, ...): keeps the objects of FASTGUIDE_OBJECTS. Returns tensor_type; or None, if this
// torch's exchange interface is another.
PyObject* attach(PyObject*, PyObject* const* objects, std::ptrdiff_t count) {
#define FASTGUIDE_COUNT(name) +1
  constexpr std::ptrdiff_t kObjects = 0 FASTGUIDE_OBJECTS(FASTGUIDE_COUNT);
#undef FASTGUIDE_COUNT
  if (count != kObjects) return refuse("attach", kObjects, count);
  PyObject* const* next = objects;
#define FASTGUIDE_KEEP(name) \
  python.name = *next++; \
  Py_IncRef(python.name);
  FASTGUIDE_OBJECTS(FASTGUIDE_KEEP)
#undef FASTGUIDE_KEEP
  python.dlpack = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(python.exchange, "dlpack_exchange_api"));
  const bool known = python.dlpack != nullptr && python.dlpack->header.version.major == DLPACK_MAJOR_VERSION &&
                     python.dlpack->dltensor_from_py_object_no_sync != nullptr;
  return true_or_none(known);
}

// Lets no exception of C++ reach Python: without memory, a step is left to the operator.
template <PyObject* (*function)(PyObject*, PyObject* const*, std::ptrdiff_t)>
PyObject* guarded(PyObject* self, PyObject* const* objects, std::ptrdiff_t count) {
  try {
    return function(self, objects, count);
  } catch (...) {
    return nothing();
  }
}

}  // namespace
}  // namespace fastguide

#define FASTGUIDE_NAME(name) #name ","
// The names of a call's arguments, of a plan's facts, and of the objects that attach gets, in order, each followed by a
// comma.
extern "C" __attribute__((visibility("default"))) const char* fastguide_call() {
  return FASTGUIDE_CALL(FASTGUIDE_NAME);
}
extern "C" __attribute__((visibility("default"))) const char* fastguide_facts() {
  return FASTGUIDE_FACTS(FASTGUIDE_NAME);
}
extern "C" __attribute__((visibility("default"))) const char* fastguide_objects() {
  return FASTGUIDE_OBJECTS(FASTGUIDE_NAME);
}
#undef FASTGUIDE_NAME

// The functions as Python knows them: repeat.py makes them callable.
extern "C" {
__attribute__((visibility("default"))) PyMethodDef fastguide_python_functions[] = {
    {"attach", fastguide::guarded<fastguide::attach>, fastguide::kFastCall, nullptr},
    {"describe", fastguide::guarded<fastguide::describe>, fastguide::kFastCall, nullptr},
    {"repeat", fastguide::guarded<fastguide::repeat>, fastguide::kFastCall, nullptr},
    {"follow", fastguide::guarded<fastguide::follow>, fastguide::kFastCall, nullptr},
    {"is_watched", fastguide::guarded<fastguide::is_watched>, fastguide::kFastCall, nullptr},
    {"fill_normals", fastguide::guarded<fastguide::fill_normals>, fastguide::kFastCall, nullptr},
    {"pass_normals", fastguide::guarded<fastguide::pass_normals>, fastguide::kFastCall, nullptr},
    {"trust_draws", fastguide::guarded<fastguide::trust_draws>, fastguide::kFastCall, nullptr},
};
}
