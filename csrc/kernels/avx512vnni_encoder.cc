// The encoder's kernels for AVX512 with VNNI.
#include <immintrin.h>

#include <cstdint>
#include <cstring>
#define NOMATMUL_LANES 16

namespace nomatmul {
namespace {

constexpr int kProductRows = 8;

typedef __m512i Acc;

inline __m512i load_pairs(const int8_t* p) {
  return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline __m512i broadcast_pair(const int16_t* p) {
  int32_t pair;
  std::memcpy(&pair, p, sizeof pair);
  return _mm512_set1_epi32(pair);
}
inline Acc multiply_add(Acc sum, __m512i a, __m512i b) { return _mm512_dpwssd_epi32(sum, a, b); }
inline void scale_store(Acc acc, const float* row_scale, float step, float* out, int count) {
  const __mmask16 lanes = static_cast<__mmask16>((1u << count) - 1);
  const __m512 scale = _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, row_scale), _mm512_set1_ps(step));
  _mm512_mask_storeu_ps(out, lanes, _mm512_mul_ps(_mm512_cvtepi32_ps(acc), scale));
}

}  // namespace
}  // namespace nomatmul

#include "encoder_impl.h"

NOMATMUL_ENCODER_TABLE(kAvx512VnniEncoder, "avx512vnni")
