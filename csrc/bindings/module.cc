// nomatmul._native.
#include "bindings/common.h"

NB_MODULE(_native, m) {
  m.doc() = "Native core of nomatmul; use it through nomatmul.load()";
  nomatmul::bind_tools(m);
  nomatmul::bind_kernels(m);
  nomatmul::bind_panels(m);
  nomatmul::bind_layers(m);
  nomatmul::bind_linear(m);
  nomatmul::bind_pages(m);
  nomatmul::bind_model(m);
}
