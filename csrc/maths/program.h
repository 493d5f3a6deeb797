// A guidance's program: makes the weights of a sample from the moments of its predictions. Host and device, no torch.
//
// The guided prediction is a vector over terms: p_0, the differences p_k - p_0, and in some programs the sample x. The
// inner products and sums of these are a sample's moments. A program computes with them in double, straight ahead, and
// its results are the terms' weights: see fastguide/guidance/encoded.py, which writes it.
#pragma once

#include <cmath>
#include <cstdint>

#include "maths/inline.h"

namespace fastguide {

// X(name), in the order of fastguide.guidance.symbols.OPERATIONS: the loader compares them.
#define FASTGUIDE_OPERATIONS(X) \
  X(add) \
  X(sub) \
  X(mul) \
  X(div) \
  X(sqrt) \
  X(exp) \
  X(minimum) \
  X(maximum) \
  X(where)

enum class Operation : int32_t {
#define FASTGUIDE_ENUMERATOR(name) name,
  FASTGUIDE_OPERATIONS(FASTGUIDE_ENUMERATOR)
#undef FASTGUIDE_ENUMERATOR
      count
};

constexpr int kMaxTerms = 4;
// The most values of a program: what it computes with, and what it computes.
constexpr int kMaxValues = 256;
// An instruction: the operation, and the places of its operands among the values. It writes the next value.
constexpr int kInstructionWords = 4;

// Of so many terms: t_i . t_j for i <= j, row by row, and then the sum of each.
FASTGUIDE_INLINE constexpr int moments_of(int terms) { return terms * (terms + 3) / 2; }

constexpr int kMostMoments = moments_of(kMaxTerms);

// Behind the moments: elements of a sample or group, the calls that its loop has made, and x0_scale, x0_sample and
// x0_pred of its row; then the parameters.
constexpr int kOtherInputs = 5;

// A program is its number of instructions, the places of the terms' weights, and the instructions.
FASTGUIDE_INLINE int64_t words_of(int terms, int64_t instructions) {
  return 1 + terms + kInstructionWords * instructions;
}

FASTGUIDE_INLINE double result_of(Operation operation, double a, double b, double c) {
  switch (operation) {
    case Operation::add:
      return a + b;
    case Operation::sub:
      return a - b;
    case Operation::mul:
      return a * b;
    case Operation::div:
      return a / b;
    case Operation::sqrt:
      return ::sqrt(a);
    case Operation::exp:
      return ::exp(a);
    case Operation::minimum:
      return ((a < b) | (a != a)) != 0 ? a : b;  // NaN if one is, as torch.minimum; no branch keeps a loop scalar
    case Operation::maximum:
      return ((a > b) | (a != a)) != 0 ? a : b;
    case Operation::where:
      return a > 0 ? b : c;
    case Operation::count:
      break;
  }
  FASTGUIDE_UNREACHABLE();
}

// How many of its moments a program reads: without the sums of terms, which are the last, if it reads none of them.
FASTGUIDE_INLINE int moments_read(const int32_t* program, int terms) {
  const int all = moments_of(terms), products = all - terms, words = int(words_of(terms, program[0]));
  for (int k = 1; k < words; ++k) {
    const bool is_operation = k > terms && (k - terms - 1) % kInstructionWords == 0;
    if (!is_operation && program[k] >= products && program[k] < all) return all;
  }
  return products;
}

// Runs a program: `values` has its inputs, and gets its results behind them. Its words have been checked.
FASTGUIDE_INLINE void run_program(const int32_t* program, int terms, int inputs, double* values) {
  const int instructions = program[0];
  FASTGUIDE_ROLL
  for (int n = 0; n < instructions; ++n) {
    const int word = 1 + terms + kInstructionWords * n;
    values[inputs + n] = result_of(Operation(program[word]), values[program[word + 1]], values[program[word + 2]],
                                   values[program[word + 3]]);
  }
}

// Runs a program for several sets of values at once, of which each gets what run_program would give it.
template <int sets>
FASTGUIDE_INLINE void run_program(const int32_t* program, int terms, int inputs, double (*values)[sets]) {
  const int instructions = program[0];
  for (int n = 0; n < instructions; ++n) {
    const int32_t* word = program + 1 + terms + kInstructionWords * n;
    const double *a = values[word[1]], *b = values[word[2]], *c = values[word[3]];
    double* __restrict result = values[inputs + n];  // behind all that it is made of
    switch (Operation(word[0])) {
#define FASTGUIDE_CASE(name) \
  case Operation::name: \
    for (int k = 0; k < sets; ++k) result[k] = result_of(Operation::name, a[k], b[k], c[k]); \
    break;
      FASTGUIDE_OPERATIONS(FASTGUIDE_CASE)
#undef FASTGUIDE_CASE
      case Operation::count:
        FASTGUIDE_UNREACHABLE();
    }
  }
}

}  // namespace fastguide
