// The dense kernels for AVX2 with FMA.
#include <immintrin.h>

#define NOMATMUL_LANES 8
#include "kernels/common/dense_vectors.h"

namespace nomatmul {
namespace {

constexpr int kProductRows = 4;

typedef __m256i Acc;

inline __m256i load_pairs(const int8_t* p) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline __m256i broadcast_pair(int32_t pair) { return _mm256_set1_epi32(pair); }
inline Acc multiply_add(Acc sum, __m256i a, __m256i b) {
  return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
}
inline V floats_of(Acc acc) { return vector_of(_mm256_cvtepi32_ps(acc)); }

}  // namespace
}  // namespace nomatmul

#include "kernels/common/dense_ops.h"

namespace nomatmul {
const DenseKernels kAvx2Dense = NOMATMUL_DENSE;
}  // namespace nomatmul
