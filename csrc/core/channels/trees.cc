// Trees of neurons (docs/numerics.md): norm, the layer of fff.h, a master leaf where there is one,
// residual.
#include <cstring>
#include <stdexcept>

#include "core/channels/ffn.h"

namespace nomatmul {
namespace {

constexpr int kMaxVisits = 65536;  // of a token

class Trees final : public Mixer {
 public:
  explicit Trees(const MixerParts& parts) {
    const Description& is = parts.description;
    spec_.form = fff_form_of(is.word("form"));
    spec_.activation = activation_of(is.word("activation"));
    spec_.hidden = parts.hidden;
    spec_.trees = is.whole("trees", 1, kMaxVisits);
    spec_.depth = is.whole("depth", 0, 24);
    if (static_cast<int64_t>(spec_.trees) * (spec_.depth + 1) > kMaxVisits) {
      throw std::invalid_argument("trees or depth is out of range");
    }
    const size_t V = static_cast<size_t>(fff_rows(spec_.trees, spec_.depth));
    Tensors& tensors = parts.tensors;
    const std::string rows = parts.name + ".rows";
    if (spec_.form == FffForm::kTernary) {
      spec_.eps = static_cast<float>(is.number("norm_eps"));
      tensors.add(rows + ".packed", DType::kU8,
                  2 * V * row_bytes_of(Packing::kTwoBit, spec_.hidden), &spec_.rows);
      tensors.add_floats(rows + ".scale", 2, &spec_.scales);
      tensors.add_floats(parts.name + ".norm_in.weight", spec_.hidden, &spec_.norm_in);
      tensors.add_floats(parts.name + ".norm_out.weight", V, &spec_.norm_out);
      return;
    }
    tensors.add(rows, dtype_of_form(is.word("form")), 2 * V * spec_.hidden, &spec_.rows);
    if (spec_.form == FffForm::kInt8) {
      tensors.add_floats(parts.name + ".row_scale", 2 * V, &spec_.scales);
    }
    if (is.number("bias") != 0) tensors.add_floats(parts.name + ".bias", V, &spec_.bias);
    if (is.has("master")) {
      master_ =
          std::make_unique<Ffn>(MixerParts{is.part("master"), parts.name + ".master", parts.hidden,
                                           parts.isa, parts.tensors, parts.linears});
    }
  }

  int active() const override { return spec_.trees * (spec_.depth + 1); }

  void reserve(Pass& pass) const override {
    pass.a.need<float>(static_cast<size_t>(pass.tokens) * spec_.hidden);
    pass.b.need<float>(static_cast<size_t>(pass.tokens) * spec_.hidden);
    if (master_ != nullptr) master_->reserve(pass);
  }

  void run(Pass& pass, const Norm& norm) const override {
    const size_t D = spec_.hidden;
    float *normed = pass.a.data<float>(), *out = pass.b.data<float>();
    pass.for_tokens(pass.tokens, spec_.hidden, [&](int t, int) {
      if (!norm.apply(pass.row(t), normed + t * D)) pass.poison();
    });
    pass.mark("norms");
    pass.check_finite("channel mixer");
    try {
      FffLayer(spec_, *pass.isa)
          .forward(normed, pass.tokens, out, pass.paths, nullptr, *pass.pool, pass.trees);
    } catch (const std::domain_error&) {  // it names a token of this chunk, which nobody knows
      pass.poison();
    }
    pass.check_finite("output of the channel mixer");
    if (master_ != nullptr) master_->add(pass, normed, out);
    pass.for_tokens(pass.tokens, spec_.hidden, [&](int t, int) {
      pass.isa->ternary->add(pass.row(t), out + t * D, spec_.hidden);
    });
    pass.mark("channel mixer");
  }

  void walk(Pass& pass, const float* x, int tokens, int32_t* rows, float* logits) const override {
    FffLayer(spec_, *pass.isa).forward(x, tokens, nullptr, rows, logits, *pass.pool, pass.trees);
  }

 private:
  FffSpec spec_;
  std::unique_ptr<Ffn> master_;
};

}  // namespace

std::unique_ptr<Mixer> make_trees(const MixerParts& parts) {
  return std::make_unique<Trees>(parts);
}

}  // namespace nomatmul
