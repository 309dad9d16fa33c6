#include "core/layers.h"

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

void feed_norm(Pass& pass, const Norm& norm, std::initializer_list<const Linear*> linears,
               const char* where, const int* rows, int count) {
  if (rows == nullptr) count = pass.tokens;
  const int products = static_cast<int>(linears.size());
  pass.expect(linears, count);
  pass.for_tokens(count, (products + 1) * pass.hidden, [&](int t, int thread) {
    float* normed = pass.place(pass.inputs[0], t, pass.floats(thread));
    if (!norm.apply(pass.row(rows == nullptr ? t : rows[t]), normed)) pass.poison();
    pass.feed(products, t, normed, thread);
  });
  pass.mark("norms");
  pass.prepare(products, count, where);
}

void MixerParts::declare(const char* linear, Linear* to, int halves) const {
  const std::string whole = name + "." + linear;
  to->declare(description.part(linear), whole, isa, tensors, halves);
  linears[whole] = to;
}

// Each in its mixer's file.
using Make = std::unique_ptr<Mixer>(const MixerParts&);
Make make_mlgru, make_attention, make_glu, make_ffn, make_trees;

std::unique_ptr<Mixer> make_mixer(const MixerParts& parts) {
  return choose<Make*>("mixer", parts.description.kind,
                       {{"mlgru", make_mlgru},
                        {"attention", make_attention},
                        {"glu", make_glu},
                        {"ffn", make_ffn},
                        {"fff", make_trees}})(parts);
}

}  // namespace nomatmul
