// Loops that are unrolled before the compiler decides what lives in registers.
//
// GCC unrolls late and leaves an array of vectors, indexed by a loop variable, on the stack: it
// halved the speed of the register tiles. Here the index is a constant from the start.
#pragma once

#include <utility>

#define NOMATMUL_INLINE __attribute__((always_inline))

namespace nomatmul {
namespace {

template <class Body, int... kIndex>
NOMATMUL_INLINE inline void unrolled_over(Body&& body, std::integer_sequence<int, kIndex...>) {
  (body(std::integral_constant<int, kIndex>{}), ...);
}

// body(0), body(1), ... body(kCount - 1), each index a std::integral_constant.
template <int kCount, class Body>
NOMATMUL_INLINE inline void unrolled(Body&& body) {
  unrolled_over(static_cast<Body&&>(body), std::make_integer_sequence<int, kCount>());
}

}  // namespace
}  // namespace nomatmul
