// Causal attention for AVX512.
#include "kernels/avx512vnni/intrinsics.h"

#include "kernels/common/attention_ops.h"

namespace nomatmul {
namespace {

struct Avx512 {
  using W = __m512;
  static constexpr int kTile = 4;

  static NOMATMUL_INLINE W zero() { return _mm512_setzero_ps(); }
  static NOMATMUL_INLINE W load(const float* p) { return _mm512_loadu_ps(p); }
  static NOMATMUL_INLINE void store(float* p, W w) { _mm512_storeu_ps(p, w); }
  static NOMATMUL_INLINE W broadcast(float x) { return _mm512_set1_ps(x); }
  static NOMATMUL_INLINE W multiply(W a, W b) { return _mm512_mul_ps(a, b); }
  static NOMATMUL_INLINE W fma(W a, W b, W c) { return _mm512_fmadd_ps(a, b, c); }
  static NOMATMUL_INLINE W halves(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static NOMATMUL_INLINE W bytes(const int8_t* p) {
    return _mm512_cvtepi32_ps(
        _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  static void to_halves(const float* from, uint16_t* to) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                        _mm512_cvtps_ph(_mm512_loadu_ps(from), _MM_FROUND_TO_NEAREST_INT));
  }
};

}  // namespace

const AttentionKernels kAvx512VnniAttention = NOMATMUL_ATTENTION(Avx512);

}  // namespace nomatmul
