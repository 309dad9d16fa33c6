// The dense kernels on any CPU: vectors of four floats, which compilers map to SSE2 or NEON.
#define NOMATMUL_LANES 4
#include <cstdint>
#include <cstring>

namespace nomatmul {
namespace {

constexpr int kProductRows = 2;

typedef int32_t Acc __attribute__((vector_size(16)));
struct Pairs {
  int16_t value[8];
};

inline Pairs load_pairs(const int8_t* p) {
  Pairs pairs;
  for (int i = 0; i < 8; ++i) pairs.value[i] = p[i];
  return pairs;
}
inline Pairs broadcast_pair(const int16_t* p) {
  Pairs pairs;
  for (int i = 0; i < 8; ++i) pairs.value[i] = p[i % 2];
  return pairs;
}
inline Acc multiply_add(Acc sum, const Pairs& a, const Pairs& b) {
  for (int i = 0; i < 4; ++i) {
    sum[i] += static_cast<int32_t>(a.value[2 * i]) * b.value[2 * i] +
              static_cast<int32_t>(a.value[2 * i + 1]) * b.value[2 * i + 1];
  }
  return sum;
}
inline void scale_store(Acc acc, const float* row_scale, float step, float* out, int count) {
  for (int i = 0; i < count; ++i) out[i] = static_cast<float>(acc[i]) * (row_scale[i] * step);
}

}  // namespace
}  // namespace nomatmul

#include "kernels/common/dense_ops.h"

namespace nomatmul {
const DenseKernels kScalarDense = NOMATMUL_DENSE;
}  // namespace nomatmul
