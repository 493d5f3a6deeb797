// The arguments of the operator by name, as the dispatcher's stack has them, and their way to the kernels' arguments.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "binding/tensors.h"
#include "kernels/arguments.h"

namespace fastguide {

using OptionalTensor = std::optional<Tensor>;
using TensorList = std::vector<Tensor>;
using Integer = int64_t;

// The arguments by name. The callee owns the entries of the dispatcher's stack: each is taken once, in order, and lives
// as long as this.
struct Operands {
  explicit Operands(StableIValue* stack);
  ~Operands();

  StableIValue* next;  // behind the arguments
#define FASTGUIDE_FIELD(type, name) type name;
  FASTGUIDE_ARGUMENTS(FASTGUIDE_FIELD)
#undef FASTGUIDE_FIELD
};

#define FASTGUIDE_COUNT(type, name) +1
constexpr uint64_t kArguments = 0 FASTGUIDE_ARGUMENTS(FASTGUIDE_COUNT);
#undef FASTGUIDE_COUNT

// Reads the arguments, whose layout is that of `out`; `predictions` holds what `a` points to. Throws.
void read(const Operands& operands, const Layout& layout, std::vector<Input>* predictions, StepArguments* a);

}  // namespace fastguide
