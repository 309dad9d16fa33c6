// What each ISA's file defines: one table, put together from the functions in its anonymous
// namespace and the float steps of float_ops.h.
#pragma once

#include "kernels.h"

#define NOMATMUL_KERNELS(isa_name)                                                   \
  {isa_name,  prepared_bytes, prepare,  scratch_bytes, product,   rms_norm_quantize, \
   normalise, scale_quantize, rms_norm, mlgru_step,    gate_norm, silu_mul,          \
   add,       codes_ok}

namespace nomatmul {

extern const Kernels kScalarKernels;
#if defined(NOMATMUL_HAVE_AVX2)
extern const Kernels kAvx2Kernels;
#endif
#if defined(NOMATMUL_HAVE_AVX512VNNI)
extern const Kernels kAvx512VnniKernels;
#endif
#if defined(NOMATMUL_HAVE_AMX)
extern const Kernels kAmxKernels;
#endif
#if defined(NOMATMUL_HAVE_NEON)
extern const Kernels kNeonKernels;
#endif

}  // namespace nomatmul
