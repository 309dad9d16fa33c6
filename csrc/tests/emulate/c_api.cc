// The emulated kernels behind plain C functions, for tests/parity to call through ctypes.
#include <stdexcept>

#include "core/channels/fff.h"
#include "core/whole_attention.h"
#include "core/whole_product.h"

namespace {

using nomatmul::Isa;
using nomatmul::Packing;

constexpr Isa kIsas[] = {
    {"avx512vnni", &nomatmul::kAvx512VnniTernary, &nomatmul::kAvx512VnniTrees, nullptr,
     &nomatmul::kAvx512VnniAttention, nullptr},
    {"amx", &nomatmul::kAmxTernary, &nomatmul::kAvx512VnniTrees, nullptr,
     &nomatmul::kAvx512VnniAttention, nullptr},
};

}  // namespace

extern "C" {

// table: 0 avx512vnni, 1 amx. Shapes are the caller's business: this is no public interface.
void emulated_product(int table, int packing, const uint8_t* w, size_t row_bytes, int n0, int n1,
                      const int8_t* q, int m, int k, const float* token_scale, void* out,
                      size_t ldo) {
  nomatmul::whole_product(*kIsas[table].ternary, static_cast<Packing>(packing), q,
                          {w, row_bytes, n0, n1, m, k, token_scale, out, ldo});
}

float emulated_rms_norm_quantize(int table, const float* x, const float* w, float eps, int d,
                                 int8_t* q) {
  return kIsas[table].ternary->rms_norm_quantize(x, w, eps, d, q);
}
void emulated_normalise(int table, const float* x, float eps, int d, float* y) {
  kIsas[table].ternary->normalise(x, eps, d, y);
}
float emulated_scale_quantize(int table, const float* y, const float* w, int rounding, int d,
                              int8_t* q) {
  return kIsas[table].ternary->scale_quantize(y, w, static_cast<nomatmul::Rounding>(rounding), d,
                                              q);
}
void emulated_rms_norm(int table, const float* x, const float* w, float eps, int d, float* y) {
  kIsas[table].ternary->rms_norm(x, w, eps, d, y);
}
void emulated_mlgru_step(int table, const float* i, const float* f, const float* lb, float keep,
                         int d, float* h) {
  kIsas[table].ternary->mlgru_step(i, f, lb, keep, d, h);
}
void emulated_gate_norm(int table, const float* g, const float* h, const float* w, float eps, int d,
                        float* y) {
  kIsas[table].ternary->gate_norm(g, h, w, eps, d, y);
}
void emulated_gated(int table, int kind, const float* gate, const float* up, int d, float* y) {
  kIsas[table].ternary->gated(static_cast<nomatmul::Activation>(kind), gate, up, d, y);
}
void emulated_add(int table, float* x, const float* y, int d) {
  kIsas[table].ternary->add(x, y, d);
}
bool emulated_codes_ok(int table, int packing, const uint8_t* w, size_t nbytes) {
  return kIsas[table].ternary->codes_ok(static_cast<Packing>(packing), w, nbytes);
}

bool emulated_causal_attention(int table, int heads, int kv_heads, int e, int tokens, int positions,
                               int form, int rows, const float* q, const float* k, const float* v,
                               float* out) {
  return nomatmul::whole_attention(*kIsas[table].attention,
                                   {heads, kv_heads, e, tokens, positions,
                                    static_cast<nomatmul::KvForm>(form), rows, q, k, v, out});
}

// The conditional layer on emulated kernels. Returns 0, 1 where a logit is not finite.
int emulated_fff_forward(int table, int form, int activation, int hidden, int trees, int depth,
                         const void* rows, const float* scales, const float* bias,
                         const float* norm_in, const float* norm_out, float eps, int threads,
                         const float* x, int tokens, float* y, int32_t* paths, float* logits) {
  nomatmul::FffSpec spec;
  spec.form = static_cast<nomatmul::FffForm>(form);
  spec.activation = static_cast<nomatmul::Activation>(activation);
  spec.hidden = hidden, spec.trees = trees, spec.depth = depth, spec.eps = eps;
  spec.rows = rows, spec.scales = scales, spec.bias = bias;
  spec.norm_in = norm_in, spec.norm_out = norm_out;
  const nomatmul::FffLayer layer(spec, kIsas[table]);
  nomatmul::ThreadPool pool(threads);
  nomatmul::FffWork work;
  try {
    layer.forward(x, tokens, y, paths, logits, pool, work);
  } catch (const std::domain_error&) {
    return 1;
  }
  return 0;
}

}  // extern "C"
