// The dense kernels for AVX512 with VNNI.
#if defined(NOMATMUL_EMULATE)
#include "tests/emulate/x86.h"
#else
#include <immintrin.h>
#endif

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
  const __m512 sums = _mm512_cvtepi32_ps(acc);
  if (count == 16) {
    const __m512 scale = _mm512_mul_ps(_mm512_loadu_ps(row_scale), _mm512_set1_ps(step));
    _mm512_storeu_ps(out, _mm512_mul_ps(sums, scale));
    return;
  }
  float floats[16];
  _mm512_storeu_ps(floats, sums);
  for (int i = 0; i < count; ++i) out[i] = floats[i] * (row_scale[i] * step);
}

}  // namespace
}  // namespace nomatmul

#include "kernels/common/dense_ops.h"

namespace nomatmul {
const DenseKernels kAvx512VnniDense = NOMATMUL_DENSE;
}  // namespace nomatmul
