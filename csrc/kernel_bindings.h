// The primitives' own bindings, for parity tests and the doctor command (kernel_bindings.cc).
#pragma once

#include <nanobind/nanobind.h>

namespace nomatmul {

void bind_kernels(nanobind::module_& m);
void bind_fff(nanobind::module_& m);      // fff_bindings.cc
void bind_encoder(nanobind::module_& m);  // encoder_ops.cc

}  // namespace nomatmul
