// The ternary FFF of a block (docs/numerics.md): three regions, walk, activate, sum. Kernels and
// their contract: kernels/fff.h.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "model.h"

namespace nomatmul {
namespace {

// Walkers that descend together: while one waits for its node, the others compute.
constexpr int kWalkers = 32;
// Trees that a task of many tokens keeps in a core's cache, and its tokens.
constexpr int kTaskTrees = 8;
constexpr int kTaskTokens = 64;
// Columns of the sum that a task takes: their packed bytes are a whole line of the cache.
constexpr int kTaskColumns = 256;

int parts_of(int whole, int part) { return (whole + part - 1) / part; }

}  // namespace

FffTree Model::tree_of(const Layer& layer) const {
  const size_t side = row_bytes_of(Packing::kTwoBit, spec_.hidden);
  FffTree tree = {};
  tree.form = FffForm::kTernary;
  tree.k = spec_.hidden;
  tree.in = layer.trees.rows;
  tree.out = layer.trees.rows + side;
  tree.stride = 2 * side;
  tree.side_bytes = side;
  tree.scale_in = layer.trees.scales[0];
  return tree;
}

void Model::trees(int l, int tokens) {
  const Layer& layer = layers_[l];
  const FffKernels& fff = fff_kernels_of(*kernels_);
  const FffTree tree = tree_of(layer);
  const int D = spec_.hidden;
  float* x = x_.need<float>(0);
  fff_bytes_ = (fff.prepared_bytes(FffForm::kTernary, D) + 63) / 64 * 64;
  uint8_t* prepared = fff_prepared_.need<uint8_t>(fff_bytes_ * tokens);
  float* steps = fff_steps_.need<float>(tokens);
  int32_t* sums = fff_sums_.need<int32_t>(tokens);
  for_tokens(tokens, 2 * D, [&](int t, int thread) {
    float* normed = thread_floats(thread);
    int8_t* q = reinterpret_cast<int8_t*>(normed + D);
    kernels_->rms_norm(x + static_cast<size_t>(t) * D, layer.channel_norm, spec_.norm_eps, D,
                       normed);
    steps[t] =
        kernels_->rms_norm_quantize(normed, layer.trees.norm_in, spec_.linear_norm_eps, D, q);
    if (!std::isfinite(steps[t])) {
      not_finite_.store(true, std::memory_order_relaxed);
      return;
    }
    sums[t] = 0;
    for (int d = 0; d < D; ++d) sums[t] += q[d];
    fff.prepare(FffForm::kTernary, q, D, prepared + fff_bytes_ * t);
  });
  check_finite("channel mixer", l);
  walk_all(tree, tokens);
  activate_all(layer, tokens);
  check_finite("output of the channel mixer", l);

  const int active = this->active();
  const int32_t* rows = fff_rows_.need<int32_t>(0);
  const int8_t* q = fff_q_.need<int8_t>(0);
  const float* scales = fff_scales_.need<float>(0);
  // With few tokens every thread takes some columns of each.
  const int parts = tokens >= 4 * threads_ ? 1 : parts_of(D, kTaskColumns);
  const int columns = parts == 1 ? D : kTaskColumns;
  pool_->run(tokens * parts, [&](int task, int thread) {
    const size_t t = task / parts;
    const int from = task % parts * columns, to = std::min(D, from + columns);
    float* y = thread_floats(thread);
    fff.combine_ternary(tree, rows + t * active, q + t * active, active, scales[t], y, from, to);
    kernels_->add(x + t * D + from, y + from, to - from);
  });
}

// Logits (without scale: the accumulators times the token's own) and rows of all tokens and trees.
void Model::walk_all(const FffTree& tree, int tokens) {
  const FffKernels& fff = fff_kernels_of(*kernels_);
  const int levels = spec_.depth + 1, nodes = tree_nodes(), active = this->active();
  float* logits = fff_logits_.need<float>(static_cast<size_t>(tokens) * active);
  int32_t* rows = fff_rows_.need<int32_t>(static_cast<size_t>(tokens) * active);
  const uint8_t* prepared = fff_prepared_.need<uint8_t>(0);
  const float* steps = fff_steps_.need<float>(0);
  const int32_t* sums = fff_sums_.need<int32_t>(0);
  const int share = std::max(kTaskTrees, parts_of(spec_.trees, threads_));
  const int step = std::min(spec_.trees, tokens == 1 ? share : kTaskTrees);
  const int groups = parts_of(spec_.trees, step), blocks = parts_of(tokens, kTaskTokens);
  pool_->run(groups * blocks, [&](int task, int) {
    const int first_tree = task % groups * step, first = task / groups * kTaskTokens;
    const int last_tree = std::min(spec_.trees, first_tree + step);
    FffWalker walkers[kWalkers];
    int count = 0;
    const auto walk = [&] {
      // A lone walker waits for its child, so both are called; among many the others hide it.
      fff.walk(tree, walkers, count, 0, levels, FffFetch{true, count < 4});
      count = 0;
    };
    for (size_t t = first; t < static_cast<size_t>(std::min(tokens, first + kTaskTokens)); ++t) {
      for (int k = first_tree; k < last_tree; ++k) {
        const size_t at = t * active + static_cast<size_t>(k) * levels;
        walkers[count++] = {
            prepared + t * fff_bytes_, steps[t], sums[t], k * nodes, 0, logits + at, rows + at};
        if (count == kWalkers) walk();
      }
    }
    if (count > 0) walk();
  });
}

// The second quantiser: int8 of the active rows' silu, normed over them, and the scale of the sum.
void Model::activate_all(const Layer& layer, int tokens) {
  const FffKernels& fff = fff_kernels_of(*kernels_);
  const int active = this->active();
  const float* logits = fff_logits_.need<float>(0);
  const int32_t* rows = fff_rows_.need<int32_t>(0);
  int8_t* q = fff_q_.need<int8_t>(static_cast<size_t>(tokens) * active);
  float* scales = fff_scales_.need<float>(tokens);
  for_tokens(tokens, 4 * active, [&](int t, int thread) {
    const size_t at = static_cast<size_t>(t) * active;
    float *h = thread_floats(thread), *weights = h + active;
    fff.activate(Activation::kSilu, logits + at, active, h);
    for (int a = 0; a < active; ++a) weights[a] = layer.trees.norm_out[rows[at + a]];
    const float step =
        kernels_->rms_norm_quantize(h, weights, spec_.linear_norm_eps, active, q + at);
    if (!std::isfinite(step)) not_finite_.store(true, std::memory_order_relaxed);
    scales[t] = layer.trees.scales[1] * step;
  });
}

void Model::walk(int layer, const int8_t* q, int tokens, int32_t* rows, int32_t* acc) {
  std::lock_guard<std::mutex> lock(*mutex_);
  const FffKernels& fff = fff_kernels_of(*kernels_);
  const int D = spec_.hidden;
  FffTree tree = tree_of(layers_[layer]);
  tree.scale_in = 1.0f;  // with steps of 1 a logit is its accumulator, which float32 holds exactly
  fff_bytes_ = (fff.prepared_bytes(FffForm::kTernary, D) + 63) / 64 * 64;
  uint8_t* prepared = fff_prepared_.need<uint8_t>(fff_bytes_ * tokens);
  std::fill_n(fff_steps_.need<float>(tokens), tokens, 1.0f);
  int32_t* sums = fff_sums_.need<int32_t>(tokens);
  for (int t = 0; t < tokens; ++t) {
    sums[t] = 0;
    for (int d = 0; d < D; ++d) sums[t] += q[static_cast<size_t>(t) * D + d];
    fff.prepare(FffForm::kTernary, q + static_cast<size_t>(t) * D, D, prepared + fff_bytes_ * t);
  }
  walk_all(tree, tokens);
  const size_t count = static_cast<size_t>(tokens) * active();
  std::copy_n(fff_rows_.need<int32_t>(0), count, rows);
  const float* logits = fff_logits_.need<float>(0);
  for (size_t i = 0; i < count; ++i) acc[i] = static_cast<int32_t>(logits[i]);
}

}  // namespace nomatmul
