// The vector registers of an instruction set.
//
// Part of each file that is compiled once for each of them.
#pragma once

namespace fastguide {
namespace FASTGUIDE_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kRegisterBytes = 64;
#elif defined(__AVX__)
constexpr int kRegisterBytes = 32;
#else
constexpr int kRegisterBytes = 16;
#endif

template <typename T>
using Register __attribute__((vector_size(kRegisterBytes))) = T;

}  // namespace
}  // namespace FASTGUIDE_ISA
}  // namespace fastguide
