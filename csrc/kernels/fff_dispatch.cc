// Which conditional kernels go with which instruction set.
#include <cstring>

#include "fff.h"

namespace nomatmul {

const FffKernels& fff_kernels_of(const Kernels& kernels) {
  const auto is = [&](const char* name) { return std::strcmp(kernels.name, name) == 0; };
#if defined(NOMATMUL_HAVE_AVX512VNNI)
  if (is("avx512vnni") || is("amx")) return kAvx512VnniFff;
#endif
#if defined(NOMATMUL_HAVE_AVX2)
  if (is("avx2")) return kAvx2Fff;
#endif
#if defined(NOMATMUL_HAVE_NEON)
  if (is("neon")) return kNeonFff;
#endif
  static_cast<void>(is);
  return kScalarFff;
}

}  // namespace nomatmul
