// Panels on the emulated AVX512-VNNI and AMX kernels, behind C functions for tests/parity.
#include "core/linears/whole_panels.h"

namespace {

const nomatmul::PanelKernels* const kTables[] = {&nomatmul::kAvx512VnniPanels,
                                                 &nomatmul::kAmxPanels};

}  // namespace

extern "C" {

// form: 0 two bits, 1 five values a byte, 2 int8. Shapes are the caller's business.
void emulated_panels(int table, int form, const void* rows, const void* scales, int half_scales,
                     int n, int k, int groups, const int8_t* q, const float* step, int m,
                     float* out) {
  using namespace nomatmul;
  const PanelKernels& kernels = *kTables[table];
  const PanelForm kind = form == 2 ? PanelForm::kInt8 : PanelForm::kTernary;
  PanelWeights weights({kind, k, k / groups, half_scales != 0}, kernels.int8_bias, n, 1);
  if (form == 2) {
    weights.fill_int8(static_cast<const int8_t*>(rows));
  } else {
    weights.fill_codes(static_cast<Packing>(form), static_cast<const uint8_t*>(rows));
  }
  weights.fill_scales(scales);
  whole_panels(kernels, weights, n, q, step, m, out);
}

void emulated_float_product(int table, int form, const void* rows, int n, int k, const float* x,
                            int m, float* out) {
  kTables[table]->float_product(
      {static_cast<nomatmul::FloatForm>(form), rows, n, m, k, x, out, static_cast<size_t>(n)});
}

}  // extern "C"
