// The dense AVX512 kernels against software stand-ins, behind C functions for
// tests/parity/test_dense_emulated.py.
#include "kernels/dense.h"

using nomatmul::kAvx512VnniDense;

extern "C" {

int dense_columns() { return kAvx512VnniDense.columns; }

bool dense_norm(const float* x, const float* weight, const float* bias, float eps, int d,
                float* y) {
  return kAvx512VnniDense.norm(x, weight, bias, eps, d, y);
}

void dense_activate(int kind, float* x, size_t count) {
  kAvx512VnniDense.activate(static_cast<nomatmul::Activation>(kind), x, count);
}

size_t dense_attention_scratch(int t, int e) { return kAvx512VnniDense.attention_scratch(t, e); }

void dense_attention(const float* qkv, size_t d, const uint8_t* seen, int t, int e, float* scratch,
                     float* out) {
  kAvx512VnniDense.attention(qkv, qkv + d, qkv + 2 * d, 3 * d, seen, t, e, scratch, out, d);
}

void dense_float_product(const float* x, int rows, int k, const float* panels, int count, int m,
                         float* out) {
  kAvx512VnniDense.float_product(x, k, rows, k, panels, 0, count, m, out, m);
}

void dense_product(const int16_t* q, size_t ldq, int rows, int k, const int8_t* panels, int count,
                   int m, const float* row_scale, const float* step, float* out) {
  kAvx512VnniDense.product(q, ldq, rows, k, panels, 0, count, m, row_scale, step, out, m);
}

}  // extern "C"
