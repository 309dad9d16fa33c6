// The conditional feed-forward layer: who walks when, over kernels/trees.h.
//
// A batch is cut in one of three ways; the bits of the result do not depend on it, nor on the
// number of threads:
//   blocks   each task takes some tokens through all trees, 16 walkers at a time, tree by tree, so
//            that cache misses of different walkers overlap and a tree's rows are used while near;
//   trees    few tokens and many trees: tasks share the trees, then the columns of the output;
//   groups   many tokens and a tree larger than a cache: tokens walk the upper levels, are sorted
//            by the node that they reach, and walk the subtrees one after the other.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/memory.h"
#include "core/thread_pool.h"
#include "kernels/isa.h"

namespace nomatmul {

// One layer's weights, in place: nothing is copied. V = trees * (2^(depth + 1) - 1) rows.
struct FffSpec {
  FffForm form = FffForm::kF32;
  Activation activation = Activation::kGelu;
  int hidden = 0, trees = 0, depth = 0;
  const void* rows = nullptr;       // [V, 2, hidden]; ternary: [V, 2, row_bytes_of(kTwoBit)]
  const float* scales = nullptr;    // int8: [V, 2]; ternary: [2]
  const float* bias = nullptr;      // [V] or nullptr
  const float* norm_in = nullptr;   // ternary: [hidden]
  const float* norm_out = nullptr;  // ternary: [V]
  float eps = 1e-6f;                // of both norms
};

// Rows of `trees` trees of `depth` decisions. Throws std::invalid_argument, naming value and limit,
// for sizes below 1 (depth below 0) or more rows than an int32 can name.
int64_t fff_rows(int trees, int depth);

// Buffers of forward(), to be kept between calls; one call at a time.
class FffWork {
 public:
  Scratch prepared, steps, sums, logits, rows, order, keys, threads;
};

class FffLayer {
 public:
  // Throws std::invalid_argument for sizes out of range or weights that are missing.
  FffLayer(const FffSpec& spec, const Isa& isa);

  int levels() const { return levels_; }
  int active() const { return levels_ * spec_.trees; }
  const FffSpec& spec() const { return spec_; }

  // y [tokens, hidden] = layer(x [tokens, hidden]); x and y must not overlap. rows (int32) and
  // logits, both [tokens, trees, levels], receive the paths, or are nullptr. y may be nullptr: then
  // only the walk is done. Throws std::domain_error, with the token, where a logit is not finite.
  void forward(const float* x, int tokens, float* y, int32_t* rows, float* logits, ThreadPool& pool,
               FffWork& work) const;

  // float32 weights that lie apart, for training: input and output rows of `hidden` floats each.
  static FffLayer apart(const FffSpec& spec, const float* w_in, const Isa& isa);

 private:
  struct Batch;
  struct Piece;

  void run(Batch& batch) const;
  void run_blocks(Batch& batch) const;
  void run_trees(Batch& batch) const;
  void run_groups(Batch& batch, int split) const;
  int split_level(int tokens) const;
  size_t ready_bytes() const;
  Piece whole(Batch& batch) const;
  void ready(const Batch& batch, const Piece& piece, int8_t* q) const;
  bool quantise(const float* x, uint8_t* prepared, float* step, int32_t* sum, int8_t* q) const;
  void finish(const Batch& batch, const Piece& piece, int tree, int trees, float* h) const;
  void prefetch_token(const Batch& batch, const Piece& piece, int i) const;
  void walk(const Batch& batch, const Piece& piece, int tree, int trees, int from, int to) const;
  void combine(const Batch& batch, const Piece& piece, int tree, int trees, float* h) const;
  void combine_ternary(const Batch& batch, const Piece& piece, float* h) const;
  bool activate(const Batch& batch, const Piece& piece, int tree, int trees, float* h) const;

  FffSpec spec_;
  FffTree tree_;
  const TernaryKernels* kernels_;
  const TreeKernels* fff_;
  int levels_;
  int32_t nodes_;  // of one tree
  size_t prepared_bytes_;
  bool as_is_;  // x needs no preparation
};

// --- training, float32 --------------------------------------------------------------------------
// Every sum has one order, whatever the number of threads: gradients are deterministic.

// y[n] = sum over a of h[n, a] * w[rows[n, a]], in the order of a.   h, rows [tokens, active].
void fff_combine(const float* h, const int32_t* rows, int tokens, int active, const float* w,
                 int columns, float* y, const TreeKernels& fff, ThreadPool& pool);
// out[n, a] = dot(g[n], w[rows[n, a]]), summed like a logit.
void fff_gather_dot(const float* g, const int32_t* rows, int tokens, int active, const float* w,
                    int columns, float* out, const TreeKernels& fff, ThreadPool& pool);
// out[v] = sum over the visits (n, a) of row v of h[n, a] * a[n], token by token: [count, columns].
// sums, if not nullptr, [count]: the sum of h alone.
void fff_segment_sum(const float* h, const int32_t* rows, int tokens, int active, const float* a,
                     int columns, int count, float* out, float* sums, const TreeKernels& fff,
                     ThreadPool& pool);

}  // namespace nomatmul
