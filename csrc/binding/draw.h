// Fills memory with the normal values of a Python generator.
#pragma once

#include <cstddef>

#include "binding/call.h"

namespace fastguide {

// Fills a tensor with a generator's values, as torch does: `memory` is what it reads as. False: torch has raised.
bool draw(PyObject* tensor, const DLTensor& memory, PyObject* generator);

// fill_normals(tensor, generator, is_own): as Tensor.normal_, by the library. True; or None, and the generator is as it
// was: this is not a draw whose bits the library knows, or other threads may draw meanwhile. is_own: none of them can.
PyObject* fill_normals(PyObject*, PyObject* const* objects, std::ptrdiff_t count);

// pass_normals(generator, count, is_own): moves a generator on as if it had filled so many float32 values. True; or
// None, and nothing is done.
PyObject* pass_normals(PyObject*, PyObject* const* objects, std::ptrdiff_t count);

// trust_draws(value): lets steps draw by the library, if that is true: it has been compared with this torch. None.
PyObject* trust_draws(PyObject*, PyObject* const* objects, std::ptrdiff_t count);

}  // namespace fastguide
