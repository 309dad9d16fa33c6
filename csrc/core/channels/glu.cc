// down(act(gate) * up). gate_proj holds the rows of gate, then those of up, or up_proj is a linear
// of its own.
#include "core/layers.h"

namespace nomatmul {
namespace {

class Glu final : public Mixer {
 public:
  explicit Glu(const MixerParts& parts)
      : activation_(activation_of(parts.description.word("activation"))),
        apart_(parts.description.has("up_proj")) {
    parts.declare("gate_proj", &gate_, apart_ ? 1 : 2);
    if (apart_) parts.declare("up_proj", &own_up_);
    parts.declare("down_proj", &down_);
    width_ = down_.inputs();
    const int outputs = gate_.outputs() + (apart_ ? own_up_.outputs() : 0);
    if (outputs != 2 * width_ || (apart_ && gate_.outputs() != width_)) {
      throw std::invalid_argument("glu: its linears do not fit together");
    }
  }

  void reserve(Pass& pass) const override {
    pass.c.need<float>(static_cast<size_t>(pass.tokens) * width_);
    pass.reserve(gate_, width_, 2, 2);
    if (apart_) pass.reserve(own_up_, width_, 2, 2);
    pass.reserve(down_);
  }

  void run(Pass& pass, const Norm& norm) const override {
    const int M = width_, up_row = apart_ ? 0 : M;
    const Linear& up_linear = apart_ ? own_up_ : gate_;
    const LinearInput& left = pass.inputs[0];
    const LinearInput& right = pass.inputs[apart_ ? 1 : 0];
    float* y = pass.c.data<float>();
    pass.announce(gate_, {gate_.row(0), up_linear.row(up_row)}, M, pass.tokens);
    if (apart_) {
      feed_norm(pass, norm, {&gate_, &own_up_}, "channel mixer");
    } else {
      feed_norm(pass, norm, {&gate_}, "channel mixer");
    }
    pass.for_tiles(pass.cut(gate_, M, 2), [&](int row, int rows, int first, int m, int thread) {
      float* gate = pass.floats(thread);
      float* up = gate + static_cast<size_t>(m) * rows;
      pass.tile(left, row, rows, first, m, gate, rows, thread);
      pass.tile(right, up_row + row, rows, first, m, up, rows, thread);
      if (!gate_.exact()) {
        pass.isa->dense->activate(activation_, gate, static_cast<size_t>(m) * rows);
      }
      for (int t = 0; t < m; ++t) {
        float* to = y + static_cast<size_t>(first + t) * M + row;
        const float *g = gate + t * rows, *u = up + t * rows;
        if (gate_.exact()) {
          pass.isa->ternary->gated(activation_, g, u, rows, to);
        } else {
          for (int r = 0; r < rows; ++r) to[r] = g[r] * u[r];
        }
      }
    });
    pass.add_linear(down_, y, "output of the channel mixer", pass.row(0));
    pass.mark("channel mixer");
  }

 private:
  Activation activation_;
  bool apart_;
  Linear gate_, own_up_, down_;
  int width_ = 0;
};

}  // namespace

std::unique_ptr<Mixer> make_glu(const MixerParts& parts) { return std::make_unique<Glu>(parts); }

}  // namespace nomatmul
