// The plain form of the conditional kernels: what the others are tested against.
#include "kernels/common/trees_ops.h"

namespace nomatmul {
namespace {

struct Scalar : OneByOne<Scalar>, PlainIntegers {
  NOMATMUL_PLAIN_FLOATS(4)
  static size_t ternary_bytes(int k) { return static_cast<size_t>(k); }
  static void ternary_prepare(const int8_t* q, int k, int8_t* prepared) {
    std::memcpy(prepared, q, static_cast<size_t>(k));
  }
  static int32_t dot_ternary(const uint8_t* row, const int8_t* q, int k) {
    int32_t sum = 0;
    for (int e = 0; e < k; ++e) sum += ((row[e / 4] >> (e % 4 * 2)) & 3) * q[e];
    return sum;
  }
};

}  // namespace

const TreeKernels kScalarTrees = NOMATMUL_TREES(Scalar);

}  // namespace nomatmul
