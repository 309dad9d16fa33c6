// The vectors of common/panels.h in AVX-512 with VNNI: a lane is a lane. Shared with AMX.
#pragma once

#include "kernels/avx512vnni/vectors.h"
#include "kernels/common/float_rows.h"

namespace nomatmul {
namespace {

struct PanelVectors {
  using Bytes = __m512i;
  using Ints = __m512i;
  using Floats = __m512;
  static constexpr int kVectors = 1;
  static constexpr int kRun = 1 << 20;
  static constexpr int kPanels = 2, kTokens = 8, kFloatRows = 8;
  static constexpr int kInt8Bias = 128;  // vpdpbusd takes unsigned weights

  struct Ternary {
    using Sum = __m512i;
    static Sum start() { return _mm512_setzero_si512(); }
    NOMATMUL_INLINE static void add(Sum& sum, Bytes weights, Bytes q) {
      add_products(sum, weights, q);
    }
    static Ints total(Sum sum) { return sum; }
  };
  using Int8 = Ternary;

  static Bytes load(const void* p) { return nomatmul::load(p); }
  static void store(void* p, Bytes v) { nomatmul::store(p, v); }
  NOMATMUL_INLINE static void fetch_ahead(const uint8_t* p) { nomatmul::fetch_ahead<12288>(p); }
  NOMATMUL_INLINE static Bytes splat4(const int8_t* p) {
    int32_t four;
    std::memcpy(&four, p, sizeof four);
    return _mm512_set1_epi32(four);
  }
  template <bool kLow>
  NOMATMUL_INLINE static Bytes three(Bytes v) {
    return _mm512_and_si512(v, _mm512_set1_epi8(kLow ? 3 : 12));
  }
  template <int kBits>
  NOMATMUL_INLINE static Bytes lower(Bytes v) {
    return _mm512_srli_epi16(v, kBits);
  }

  static Ints none() { return _mm512_setzero_si512(); }
  static Ints plus(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
  static Ints fourth(Ints v) { return _mm512_srai_epi32(v, 2); }
  static Ints less(Ints v, int32_t by) { return _mm512_sub_epi32(v, _mm512_set1_epi32(by)); }
  static Floats floats_of(Ints v) { return _mm512_cvtepi32_ps(v); }

  static Floats zero() { return _mm512_setzero_ps(); }
  static Floats splat(float v) { return _mm512_set1_ps(v); }
  static Floats times(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
  static Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
  static Floats load_floats(const float* p) { return _mm512_loadu_ps(p); }
  static void store_floats(float* p, Floats v) { _mm512_storeu_ps(p, v); }
  static Floats load_halves(const uint8_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static Floats load_bfloats(const uint8_t* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
};

}  // namespace
}  // namespace nomatmul
