// Loops that are unrolled before the compiler decides what lives in registers.
//
// GCC unrolls late and leaves an array of vectors, indexed by a loop variable, on the stack: it
// halved the speed of the register tiles. Here the index is a constant from the start.
#pragma once

#include <utility>

// Emulated or instrumented by a sanitizer, speed does not matter and inlining costs minutes.
#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define NOMATMUL_SLOW_BUILD
#endif
#endif
#if defined(NOMATMUL_EMULATE) || defined(__SANITIZE_ADDRESS__)
#define NOMATMUL_SLOW_BUILD
#endif
#if defined(NOMATMUL_SLOW_BUILD)
#define NOMATMUL_INLINE
#else
#define NOMATMUL_INLINE __attribute__((always_inline))
#endif

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
