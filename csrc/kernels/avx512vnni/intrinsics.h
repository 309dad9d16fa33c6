// AVX-512's intrinsics, or software stand-ins for them.
#pragma once

#if defined(NOMATMUL_EMULATE)
#include "tests/emulate/x86.h"
#else
// GCC 12 calls its own _mm512_undefined_epi32 uninitialised (its bug 105593).
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#endif
