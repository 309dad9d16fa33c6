// down(act(gate) * up); gate_proj holds the rows of gate, then those of up.
#include "core/layers.h"

namespace nomatmul {
namespace {

class Glu final : public Mixer {
 public:
  explicit Glu(const MixerParts& parts)
      : activation_(activation_of(parts.description.word("activation"))) {
    parts.declare("gate_proj", &gate_, 2);
    parts.declare("down_proj", &down_);
    width_ = down_.inputs();
    if (gate_.outputs() != 2 * width_ || (gate_.ternary() && activation_ != Activation::kSilu)) {
      throw std::invalid_argument(
          "glu: its linears do not fit together, or its activation is not"
          " the ternary kernels' silu");
    }
  }

  void reserve(Pass& pass) const override {
    pass.c.need<float>(static_cast<size_t>(pass.tokens) * width_);
    pass.reserve(gate_, width_, 2, 2);
    pass.reserve(down_);
  }

  void run(Pass& pass, const Norm& norm) const override {
    const int M = width_;
    const LinearInput& input = pass.inputs[0];
    float* y = pass.c.data<float>();
    pass.announce(gate_, {gate_.row(0), gate_.row(M)}, M, pass.tokens);
    feed_norm(pass, norm, {&gate_}, "channel mixer");
    pass.for_tiles(pass.cut(gate_, M, 2), [&](int row, int rows, int first, int m, int thread) {
      float* gate = pass.floats(thread);
      float* up = gate + static_cast<size_t>(m) * rows;
      pass.tile(input, row, rows, first, m, gate, rows, thread);
      pass.tile(input, M + row, rows, first, m, up, rows, thread);
      if (!gate_.ternary()) {
        pass.isa->dense->activate(activation_, gate, static_cast<size_t>(m) * rows);
      }
      for (int t = 0; t < m; ++t) {
        float* to = y + static_cast<size_t>(first + t) * M + row;
        const float *left = gate + t * rows, *right = up + t * rows;
        if (gate_.ternary()) {
          pass.isa->ternary->silu_mul(left, right, rows, to);
        } else {
          for (int r = 0; r < rows; ++r) to[r] = left[r] * right[r];
        }
      }
    });
    pass.add_linear(down_, y, "output of the channel mixer", pass.row(0));
    pass.mark("channel mixer");
  }

 private:
  Activation activation_;
  Linear gate_, down_;
  int width_ = 0;
};

}  // namespace

std::unique_ptr<Mixer> make_glu(const MixerParts& parts) { return std::make_unique<Glu>(parts); }

}  // namespace nomatmul
