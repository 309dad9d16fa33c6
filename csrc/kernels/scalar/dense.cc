// The dense kernels on any CPU: vectors of four floats, which compilers map to SSE2 or NEON.
#define NOMATMUL_LANES 4
#include "kernels/common/dense_vectors.h"

namespace nomatmul {
namespace {

constexpr int kProductRows = 2;

typedef VI Acc;
struct Pairs {
  int16_t value[8];
};

inline Pairs load_pairs(const int8_t* p) {
  Pairs pairs;
  for (int i = 0; i < 8; ++i) pairs.value[i] = p[i];
  return pairs;
}
inline Pairs broadcast_pair(int32_t pair) {
  Pairs pairs;
  for (int i = 0; i < 4; ++i) std::memcpy(pairs.value + 2 * i, &pair, sizeof pair);
  return pairs;
}
inline Acc multiply_add(Acc sum, const Pairs& a, const Pairs& b) {
  for (int i = 0; i < 4; ++i) {
    sum[i] += static_cast<int32_t>(a.value[2 * i]) * b.value[2 * i] +
              static_cast<int32_t>(a.value[2 * i + 1]) * b.value[2 * i + 1];
  }
  return sum;
}
inline V floats_of(Acc acc) { return __builtin_convertvector(acc, V); }

}  // namespace
}  // namespace nomatmul

#include "kernels/common/dense_ops.h"

namespace nomatmul {
const DenseKernels kScalarDense = NOMATMUL_DENSE;
}  // namespace nomatmul
