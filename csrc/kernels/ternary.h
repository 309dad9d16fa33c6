// Products of packed ternary weights, and the float steps between them: one table of function
// pointers per instruction set.
//
// Legend: m tokens, k input elements of a row, n output rows. q int8 activations, w packed ternary
// weights, acc[t][n] = sum_k q[t][k] * (w[n][k] in {-1, 0, 1}), an exact int32 on every ISA.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/activation.h"
#include "kernels/rounding.h"

namespace nomatmul {

// How a row of ternary values is stored (formats/packing.py is the contract).
// kTwoBit: code = value + 1 in bits 2*(k%4) of byte k/4. kBase3: digits k%5 of byte k/5, most
// significant first, byte = ceil(number * 256 / 243). Rows are padded to 32 bytes with value 0.
enum class Packing : int { kTwoBit = 0, kBase3 = 1 };

// Rows n0..n1 of w (row stride row_bytes, any alignment) times m tokens of k elements each:
// out[t * ldo + n], n absolute. Of each row row_bytes_of(packing, k) bytes are read and no more.
struct TernaryProduct {
  const uint8_t* w;
  size_t row_bytes;
  int n0, n1;
  int m, k;
  // nullptr: out is int32_t*, the accumulator; otherwise float* = float(acc) * token_scale[t].
  const float* token_scale;
  void* out;
  size_t ldo;
  const void* prepared = nullptr;  // by prepare(), of the same packing, m and k
  void* scratch = nullptr;         // scratch_bytes(), 64-byte aligned
};

struct TernaryKernels {
  // Bytes of prepared activations for m tokens of k elements. The buffer must be 64-byte aligned.
  size_t (*prepared_bytes)(Packing, int m, int k);

  // q: int8 [m, ldq], 0 <= m, 1 <= k <= ldq. Writes the layout that this ISA's product reads; it
  // is opaque and depends on (packing, m, k).
  void (*prepare)(Packing, const int8_t* q, int m, int k, int ldq, void* prepared);

  // Bytes of scratch that one thread needs in product(). 64-byte aligned, may be 0.
  size_t (*scratch_bytes)(Packing, int m, int k);

  void (*product)(Packing, const TernaryProduct&);

  // Float steps, one token of d elements each; bits are identical on every ISA (float_ops.h).
  // Buffers need only float alignment. Outputs may alias the input of the same shape.

  // q = quantise(rms_norm(x) * w); returns absmax / 127 (multiply by the weight scale to get
  // token_scale). Returns NaN, and leaves q undefined, where x is not finite.
  float (*rms_norm_quantize)(const float* x, const float* w, float eps, int d, int8_t* q);
  // The same in two parts, for several linears that share x: normalise gives y = x / sqrt(mean(x^2)
  // + eps), and scale_quantize(y, w, ...) then what rms_norm_quantize(x, w, ...) gives, bit for
  // bit. w == nullptr: y is not multiplied. `rounding`: of ties; rms_norm_quantize() has kAway.
  void (*normalise)(const float* x, float eps, int d, float* y);
  float (*scale_quantize)(const float* y, const float* w, Rounding rounding, int d, int8_t* q);
  // y = x / sqrt(mean(x^2) + eps) * w
  void (*rms_norm)(const float* x, const float* w, float eps, int d, float* y);
  // h = f' * h + keep * silu(i) * (1 - f'), f' = lb + (1 - lb) * sigmoid(f); lb may be nullptr (0).
  void (*mlgru_step)(const float* i, const float* f, const float* lb, float keep, int d, float* h);
  // y = rms_norm(g) * w * silu(h)
  void (*gate_norm)(const float* g, const float* h, const float* w, float eps, int d, float* y);
  // y = activation(gate) * up
  void (*gated)(Activation, const float* gate, const float* up, int d, float* y);
  // x += y
  void (*add)(float* x, const float* y, int d);

  // False where a byte is no legal code: a 2-bit code 3, or a byte that no five digits produce.
  bool (*codes_ok)(Packing, const uint8_t* w, size_t nbytes);
};

// Bytes of a packed row of k elements, padding included.
constexpr size_t row_bytes_of(Packing packing, int k) {
  const size_t step = packing == Packing::kTwoBit ? 128 : 160;
  return (static_cast<size_t>(k) + step - 1) / step * 32;
}

// Largest k whose accumulators cannot leave int32 on any path (2 * 128 * k < 2^31).
constexpr int kMaxElements = 8'000'000;

// Each is defined in <isa>/ternary.cc.
extern const TernaryKernels kScalarTernary, kAvx2Ternary, kAvx512VnniTernary, kAmxTernary,
    kNeonTernary;

}  // namespace nomatmul
