// Causal attention for AVX2 with FMA and F16C.
#include <immintrin.h>

#include "kernels/common/attention_ops.h"

namespace nomatmul {
namespace {

struct Avx2 {
  struct W {
    __m256 low, high;
  };
  static constexpr int kTile = 1;

  static NOMATMUL_INLINE W zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static NOMATMUL_INLINE W load(const float* p) {
    return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)};
  }
  static NOMATMUL_INLINE void store(float* p, const W& w) {
    _mm256_storeu_ps(p, w.low);
    _mm256_storeu_ps(p + 8, w.high);
  }
  static NOMATMUL_INLINE W broadcast(float x) {
    const __m256 all = _mm256_set1_ps(x);
    return {all, all};
  }
  static NOMATMUL_INLINE W multiply(const W& a, const W& b) {
    return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
  }
  static NOMATMUL_INLINE W fma(const W& a, const W& b, const W& c) {
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
  }
  static NOMATMUL_INLINE W halves(const uint16_t* p) {
    const auto* from = reinterpret_cast<const __m128i*>(p);
    return {_mm256_cvtph_ps(_mm_loadu_si128(from)), _mm256_cvtph_ps(_mm_loadu_si128(from + 1))};
  }
  static NOMATMUL_INLINE W bytes(const int8_t* p) {
    const auto half = [](const int8_t* from) {
      const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
      return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight));
    };
    return {half(p), half(p + 8)};
  }
  static void to_halves(const float* from, uint16_t* to) {
    for (int i = 0; i < 16; i += 8) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                       _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
    }
  }
};

}  // namespace

const AttentionKernels kAvx2Attention = NOMATMUL_ATTENTION(Avx2);

}  // namespace nomatmul
