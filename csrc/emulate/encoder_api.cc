// The encoder's AVX512 kernels against software stand-ins, behind C functions for
// tests/parity/test_encoder_emulated.py.
#include "../kernels/encoder_ops.h"

using nomatmul::kAvx512VnniEncoder;

extern "C" {

int encoder_columns() { return kAvx512VnniEncoder.columns; }

bool encoder_add_norm(float* x, const float* delta, const float* weight, const float* bias,
                      float eps, int d, float* y) {
  return kAvx512VnniEncoder.add_norm(x, delta, weight, bias, eps, d, y);
}

void encoder_activate(int kind, float* x, size_t count) {
  (kind == 0 ? kAvx512VnniEncoder.gelu : kAvx512VnniEncoder.silu)(x, count);
}

size_t encoder_attention_scratch(int t, int e) {
  return kAvx512VnniEncoder.attention_scratch(t, e);
}

void encoder_attention(const float* qkv, size_t d, const uint8_t* seen, int t, int e,
                       float* scratch, float* out) {
  kAvx512VnniEncoder.attention(qkv, qkv + d, qkv + 2 * d, 3 * d, seen, t, e, scratch, out, d);
}

void encoder_float_product(const float* x, int rows, int k, const float* panels, int count, int m,
                           float* out) {
  kAvx512VnniEncoder.float_product(x, k, rows, k, panels, 0, count, m, out, m);
}

void encoder_product(const int16_t* q, size_t ldq, int rows, int k, const int8_t* panels, int count,
                     int m, const float* row_scale, const float* step, float* out) {
  kAvx512VnniEncoder.product(q, ldq, rows, k, panels, 0, count, m, row_scale, step, out, m);
}

}  // extern "C"
