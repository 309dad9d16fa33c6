// The ternary FFF of a block (docs/numerics.md): norm, the layer of fff.h, residual.
#include <stdexcept>

#include "core/channels/fff.h"
#include "core/model.h"

namespace nomatmul {

FffLayer Model::fff_of(const Layer& layer) const {
  FffSpec fff;
  fff.form = FffForm::kTernary;
  fff.activation = Activation::kSilu;
  fff.hidden = spec_.hidden;
  fff.trees = spec_.trees, fff.depth = spec_.depth;
  fff.rows = layer.trees.rows, fff.scales = layer.trees.scales;
  fff.norm_in = layer.trees.norm_in, fff.norm_out = layer.trees.norm_out;
  fff.eps = spec_.linear_norm_eps;
  return FffLayer(fff, *isa_);
}

void Model::trees(int l, int tokens) {
  const Layer& layer = layers_[l];
  const size_t D = spec_.hidden;
  float *x = x_.need<float>(0), *normed = g_.need<float>(0), *out = h_.need<float>(0);
  for_tokens(tokens, spec_.hidden, [&](int t, int) {
    kernels_->rms_norm(x + t * D, layer.channel_norm, spec_.norm_eps, spec_.hidden, normed + t * D);
  });
  try {
    fff_of(layer).forward(normed, tokens, out, nullptr, nullptr, *pool_, fff_work_);
  } catch (const std::domain_error&) {  // it names a token of this chunk, which nobody knows
    not_finite_.store(true, std::memory_order_relaxed);
  }
  check_finite("output of the channel mixer", l);
  for_tokens(tokens, spec_.hidden,
             [&](int t, int) { kernels_->add(x + t * D, out + t * D, spec_.hidden); });
}

void Model::walk(int layer, const float* x, int tokens, int32_t* rows, float* logits) {
  std::lock_guard<std::mutex> lock(*mutex_);
  fff_of(layers_[layer]).forward(x, tokens, nullptr, rows, logits, *pool_, fff_work_);
}

}  // namespace nomatmul
