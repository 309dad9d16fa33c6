// The plain form of the conditional kernels: what the others are tested against.
#include "kernels/common/trees_ops.h"

namespace nomatmul {
namespace {

struct Scalar : PlainIntegers {
  NOMATMUL_PLAIN_FLOATS(4)
  static F load(const uint16_t* p) { return load_wide(p); }
  static F load(const int8_t* p) { return load_wide(p); }
  static void four_int8(const int8_t* const (&rows)[kFour], const int16_t* const (&x)[kFour], int k,
                        int32_t* out) {
    each_int8<Scalar>(rows, x, k, out);
  }
  static void four_ternary(const uint8_t* const (&rows)[kFour], const int8_t* const (&x)[kFour],
                           int k, int32_t* out) {
    each_ternary<Scalar>(rows, x, k, out);
  }
};

}  // namespace

const TreeKernels kScalarTrees = NOMATMUL_TREES(Scalar);

}  // namespace nomatmul
