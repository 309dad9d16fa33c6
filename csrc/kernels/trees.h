// Kernels of the conditional feed-forward layer (trees of neurons, arXiv 2311.10770): one table an
// instruction set. core/channels/fff.cc decides who walks when; here a few walkers descend
// together.
//
// Results have the same bits on every ISA and equal nomatmul.reference.trees:
//   - a float logit is summed in 64 lanes (element k in lane k % 64, from zero, one product and one
//     addition each) that are folded by halves (lane i + lane i + 32, then 16, ... 1); then + bias;
//   - int8 and ternary logits are exact int32 sums, scaled by (scale of the row * the token's
//   step);
//   - an output is summed row by row in the order given: y = y + c * w, rounded twice.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/activation.h"

namespace nomatmul {

enum class FffForm : int { kF32 = 0, kBF16 = 1, kInt8 = 2, kTernary = 3 };

// The weights of one layer. Row v's input weights are at in + v * stride, its output weights at
// out + v * stride, k elements each (ternary: a packed 2-bit row).
struct FffTree {
  FffForm form;
  int k;
  const uint8_t* in;
  const uint8_t* out;
  size_t stride;
  size_t side_bytes;       // of the input or output weights of one row
  const float* row_scale;  // int8: [V, 2]
  float scale_in;          // ternary
  const float* bias;       // [V] or nullptr
};

// One token on its way down one tree.
struct FffWalker {
  const void* x;  // the token as prepare() left it
  float step;     // int8, ternary: the token's quantisation step
  int32_t sum;    // ternary: sum of its q
  int32_t base;   // row of the tree's root
  int32_t node;   // where it is, within the tree; walk() moves it
  float* logits;  // [levels]
  int32_t* rows;  // [levels]
};

// What walk() prefetches beyond what it reads.
struct FffFetch {
  bool out;   // the visited rows' output weights
  bool both;  // both children before the decision; else the chosen one after it
};

struct TreeKernels {
  // Bytes of one prepared token of k elements, to be aligned to 64; 0: it is taken as it is.
  size_t (*prepared_bytes)(FffForm, int k);
  // f32, bf16: x float [k]. int8, ternary: q int8 [k]. Writes prepared_bytes(form, k) bytes.
  void (*prepare)(FffForm, const void* x, int k, void* prepared);
  // q = int8 of x by its absmax, as docs/numerics.md rounds; returns absmax / 127, NaN where x is
  // not finite.
  float (*quantise)(const float* x, int k, int8_t* q);
  // Moves count walkers through levels from..to - 1 of their trees.
  void (*walk)(const FffTree&, FffWalker*, int count, int from, int to, FffFetch);
  // y[c] = (add ? y[c] : 0) + sum of coefficient[i] * out_row(rows[i])[c] for c in from..to - 1, in
  // the order of i. from is a multiple of 64. next: rows that the next call reads, or nullptr.
  // Not ternary.
  void (*combine)(const FffTree&, const int32_t* rows, const float* coefficient, int count,
                  float* y, int from, int to, bool add, const int32_t* next);
  // y[c] = float(sum of q[i] * t_out(rows[i])[c]) * scale; from is a multiple of 128. next: rows,
  // count of them, that the next call reads, or nullptr.
  void (*combine_ternary)(const FffTree&, const int32_t* rows, const int8_t* q, int count,
                          float scale, float* y, int from, int to, const int32_t* next);
  // h = act(logits); false where a logit is not finite.
  bool (*activate)(Activation, const float* logits, int count, float* h);
  // out[i] = dot(x, in_row(rows[i])), summed like a logit; float32 rows, x as prepare() left it.
  void (*dots)(const FffTree&, const int32_t* rows, int count, const float* x, float* out);
};

// Each is defined in <isa>/trees.cc; AMX has none of its own.
extern const TreeKernels kScalarTrees, kAvx2Trees, kAvx512VnniTrees, kNeonTrees;

}  // namespace nomatmul
