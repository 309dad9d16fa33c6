// The dense kernels for AVX2 with FMA.
#include <immintrin.h>

#include <cstdint>
#include <cstring>
#define NOMATMUL_LANES 8

namespace nomatmul {
namespace {

constexpr int kProductRows = 4;

typedef __m256i Acc;

inline __m256i load_pairs(const int8_t* p) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline __m256i broadcast_pair(const int16_t* p) {
  int32_t pair;
  std::memcpy(&pair, p, sizeof pair);
  return _mm256_set1_epi32(pair);
}
inline Acc multiply_add(Acc sum, __m256i a, __m256i b) {
  return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
}
inline void scale_store(Acc acc, const float* row_scale, float step, float* out, int count) {
  const __m256 sums = _mm256_cvtepi32_ps(acc);
  if (count == 8) {
    const __m256 scale = _mm256_mul_ps(_mm256_loadu_ps(row_scale), _mm256_set1_ps(step));
    _mm256_storeu_ps(out, _mm256_mul_ps(sums, scale));
    return;
  }
  for (int i = 0; i < count; ++i) out[i] = sums[i] * (row_scale[i] * step);
}

}  // namespace
}  // namespace nomatmul

#include "kernels/common/dense_ops.h"

namespace nomatmul {
const DenseKernels kAvx2Dense = NOMATMUL_DENSE;
}  // namespace nomatmul
