// The primitives' own bindings, for parity tests and the doctor command (kernel_bindings.cc).
#pragma once

#include <nanobind/nanobind.h>

namespace nomatmul {

void bind_kernels(nanobind::module_& m);

}  // namespace nomatmul
