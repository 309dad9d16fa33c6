// The plain form of the conditional kernels: what the others are tested against.
#include "fff_ops.h"

namespace nomatmul {
namespace {

struct Scalar : PlainIntegers {
  NOMATMUL_PLAIN_FLOATS(4)
  static F load(const uint16_t* p) { return load_wide(p); }
  static F load(const int8_t* p) { return load_wide(p); }
};

}  // namespace

const FffKernels kScalarFff = NOMATMUL_FFF(Scalar);

}  // namespace nomatmul
