// The dense kernels for AVX512 with VNNI.
#include "kernels/avx512vnni/intrinsics.h"

#define NOMATMUL_LANES 16
#include "kernels/common/dense_vectors.h"

namespace nomatmul {
namespace {

constexpr int kProductRows = 8;

typedef __m512i Acc;

inline __m512i load_pairs(const int8_t* p) {
  return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline __m512i broadcast_pair(int32_t pair) { return _mm512_set1_epi32(pair); }
inline Acc multiply_add(Acc sum, __m512i a, __m512i b) { return _mm512_dpwssd_epi32(sum, a, b); }
inline V floats_of(Acc acc) { return vector_of(_mm512_cvtepi32_ps(acc)); }

}  // namespace
}  // namespace nomatmul

#include "kernels/common/dense_ops.h"

namespace nomatmul {
const DenseKernels kAvx512VnniDense = NOMATMUL_DENSE;
}  // namespace nomatmul
