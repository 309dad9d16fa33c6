// Float steps and products of models with float32 or int8 linears, one table an instruction set.
// Their float sums may differ in the last bits between instruction sets, as a
// BLAS's do; the int8 product is exact. Causal decoders promise more and never use them.
//
// Legend: n tokens, d hidden size, e size of a head, k inputs and m outputs of a linear layer.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/activation.h"

namespace nomatmul {

struct DenseKernels {
  // One token: y = layer norm of x, or with bias == nullptr the RMS norm. x != y. False where the
  // norm of x is not finite.
  bool (*norm)(const float* x, const float* weight, const float* bias, float eps, int d, float* y);

  // x = gelu(x) (error function, absolute error below 1e-6), silu(x), max(x, 0) or its square.
  void (*activate)(Activation, float* x, size_t count);

  // One head of one sequence of t tokens: out = softmax(q k^T / sqrt(e)) v. q, k, v and out have
  // row strides ld and ldo. seen[s] == 0 hides key s; nullptr hides none. At least one is seen.
  void (*attention)(const float* q, const float* k, const float* v, size_t ld, const uint8_t* seen,
                    int t, int e, float* scratch, float* out, size_t ldo);
  size_t (*attention_scratch)(int t, int e);  // floats

  int columns;  // outputs of a panel

  // float32 weights in panels of `columns` outputs, [k][columns]: element (i, j) of panel p is
  // input i of row p * columns + j; rows behind m are zero. out[t * ldo + j] = x[t] . w[j] for
  // panels p0..p1. Every sum runs over k in the same order, whatever the other rows and panels are.
  void (*float_product)(const float* x, size_t ldx, int rows, int k, const float* panels, int p0,
                        int p1, int m, float* out, size_t ldo);

  // int8 weights in panels of `columns` outputs: element (j, i) of panel p is row p * columns + j;
  // inputs in pairs, [k / 2 up][columns][2]. Rows behind m and inputs behind k are zero.
  // acc[j] of rows of q (int16 holding int8, row stride ldq, even and zero-padded), panels p0..p1:
  // out[t * ldo + j] = float(acc) * (row_scale[j] * step[t]).
  void (*product)(const int16_t* q, size_t ldq, int rows, int k, const int8_t* panels, int p0,
                  int p1, int m, const float* row_scale, const float* step, float* out, size_t ldo);
};

// Each is defined in <isa>/dense.cc; AMX and NEON have none of their own.
extern const DenseKernels kScalarDense, kAvx2Dense, kAvx512VnniDense;

}  // namespace nomatmul
