#include "core/layers.h"

#include <stdexcept>

namespace nomatmul {

void Norm::declare(const Description& description, const std::string& name, const Isa& isa,
                   Tensors& tensors) {
  isa_ = &isa;
  size_ = description.whole("size", 1, kMaxElements);
  eps_ = static_cast<float>(description.number("eps"));
  exact_ = description.number("exact") != 0;
  tensors.add_floats(name + ".weight", size_, &weight_);
  if (description.kind == "layer") tensors.add_floats(name + ".bias", size_, &bias_);
}

bool Norm::apply(const float* x, float* y) const {
  if (exact_) {
    isa_->ternary->rms_norm(x, weight_, eps_, size_, y);
    return true;  // the quantiser behind it finds out
  }
  return isa_->dense->norm(x, weight_, bias_, eps_, size_, y);
}

void feed_norm(Pass& pass, const Norm& norm, std::initializer_list<LinearInput*> inputs) {
  const int products = static_cast<int>(inputs.size());
  pass.for_tokens(pass.tokens, (products + 1) * pass.hidden, [&](int t, int thread) {
    float* normed = pass.place(**inputs.begin(), t, pass.floats(thread));
    if (!norm.apply(pass.row(t), normed)) pass.poison();
    pass.feed(inputs, t, normed, thread);
  });
}

void MixerParts::declare(const char* linear, Linear* to, int halves) const {
  const std::string whole = name + "." + linear;
  to->declare(description.part(linear), whole, isa, tensors, halves);
  linears[whole] = to;
}

Activation activation_of(const std::string& name) {
  if (name == "gelu") return Activation::kGelu;
  if (name == "silu") return Activation::kSilu;
  if (name == "relu") return Activation::kRelu;
  throw std::invalid_argument("activation \"" + name + "\" is unknown: gelu, silu or relu");
}

// Each in its mixer's file.
using Make = std::unique_ptr<Mixer>(const MixerParts&);
Make make_mlgru, make_attention, make_glu, make_ffn, make_trees;

std::unique_ptr<Mixer> make_mixer(const MixerParts& parts) {
  static const std::map<std::string, Make*> kinds = {{"mlgru", make_mlgru},
                                                     {"attention", make_attention},
                                                     {"glu", make_glu},
                                                     {"ffn", make_ffn},
                                                     {"fff", make_trees}};
  const auto found = kinds.find(parts.description.kind);
  if (found != kinds.end()) return found->second(parts);
  throw std::invalid_argument("no mixer of kind \"" + parts.description.kind + "\"");
}

}  // namespace nomatmul
