// Whether moments that were added up in float have digits left for what is made of them. Host only.
#pragma once

#include <cstdint>
#include <limits>

#include "maths/inline.h"
#include "maths/program.h"

namespace fastguide {

// Sums in float are right to 1.5e-8 of the products that they are made of, and what is made of sums that nearly cancel
// to so many times less; of predictions in half precision to 1e-6, as squares of short numbers are rounded to one side.
// Two predictions are soon added up again in double; a step of three takes four times as long.
constexpr double kLeastSpread = 1.0 / 4, kLeastSpreadOfMany = 1.0 / 64;

// Products of floats below 1e-38 have lost digits: of a p_0 whose square is greater, it takes no more than a millionth.
constexpr double kLeastSquare = 1e-25;

// Returns whether the vectors that moments are of point in ways of their own: the determinant of their cosines is 1
// where they are at right angles, and 0 where one is made of the others, and then hardly a digit is left of their
// difference. With sums, a vector of ones is among them. Zeros are left out. What has overflowed is not spread, nor is
// a p_0 whose squares are too small for a float.
FASTGUIDE_INLINE bool are_spread(const double* moments, int terms, bool with_sums, double numel) {
  const int count = terms + (with_sums ? 1 : 0);
  const double least = terms == 2 ? kLeastSpread : kLeastSpreadOfMany;
  double left[kMaxTerms + 1][kMaxTerms + 1], spread = 1;
  const double *products = moments, *sums = moments + terms * (terms + 1) / 2;
  for (int i = 0; i < terms; ++i) {
    for (int j = i; j < terms; ++j) left[i][j] = *products++;
    left[i][terms] = with_sums ? sums[i] : 0;
  }
  left[terms][terms] = numel;
  double squares[kMaxTerms + 1];
  for (int i = 0; i < count; ++i) squares[i] = left[i][i];
  if (squares[0] < kLeastSquare) return false;
  for (int i = 0; i < terms; ++i) {
    if (!(squares[i] < std::numeric_limits<double>::infinity())) return false;
  }
  for (int i = 0; i < count; ++i) {  // what is left of a vector, without its parts along those before it
    if (!(squares[i] > 0)) continue;
    spread *= left[i][i] / squares[i];
    if (spread < least) return false;
    for (int j = i + 1; j < count; ++j) {
      const double factor = left[i][j] / left[i][i];
      for (int k = j; k < count; ++k) left[j][k] -= factor * left[i][k];
    }
  }
  return true;
}

}  // namespace fastguide
