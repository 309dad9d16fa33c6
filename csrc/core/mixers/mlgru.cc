// The element-wise recurrence of arXiv 2406.02528. Each ternary linear is one parallel region over
// rows; the recurrence is done in the same task, while the gates of its rows are in cache.
#include <cstring>

#include "core/layers.h"

namespace nomatmul {
namespace {

class Mlgru final : public Mixer {
 public:
  explicit Mlgru(const MixerParts& parts) : size_(parts.hidden) {
    gate_norm_eps_ = static_cast<float>(parts.description.part("g_norm").number("eps"));
    parts.declare("i_proj", &i_);
    parts.declare("f_proj", &f_);
    parts.declare("g_proj", &g_);
    parts.declare("o_proj", &o_);
    parts.tensors.add_floats(parts.name + ".g_norm.weight", size_, &g_norm_);
    parts.tensors.add_floats(parts.name + ".lower_bound", size_, &lower_bound_);
  }

  std::vector<StatePiece> state() const override { return {{"h", size_}}; }

  void reserve(Pass& pass) const override {
    pass.a.need<float>(static_cast<size_t>(pass.tokens) * size_);
    pass.b.need<float>(static_cast<size_t>(pass.tokens) * size_);
    pass.reserve(i_, size_, 3, 2);
    pass.reserve(o_);
  }

  void run(Pass& pass, const Norm& norm) const override {
    const size_t D = size_;
    float *g = pass.a.data<float>(), *h = pass.b.data<float>();
    pass.announce(i_, {i_.row(0), f_.row(0), g_.row(0)}, size_, pass.tokens);
    feed_norm(pass, norm, {&i_, &f_, &g_}, "token mixer");

    // i, f, g for some rows and all tokens, then the recurrence of those rows through time.
    pass.for_tiles(pass.cut(i_, size_, 3), [&](int row, int rows, int first, int m, int thread) {
      float* i = pass.floats(thread);
      float* f = i + static_cast<size_t>(m) * rows;
      pass.tile(pass.inputs[0], row, rows, first, m, i, rows, thread);
      pass.tile(pass.inputs[1], row, rows, first, m, f, rows, thread);
      pass.tile(pass.inputs[2], row, rows, first, m, g + first * D + row, D, thread);
      for (int t = 0; t < m; ++t) {
        float* state = pass.state(first + t) + row;
        pass.isa->ternary->mlgru_step(i + t * rows, f + t * rows, lower_bound_ + row, 1.0f, rows,
                                      state);
        std::memcpy(h + (first + t) * D + row, state, rows * sizeof(float));
      }
    });

    pass.announce(o_, {o_.row(0)}, size_, pass.tokens);
    o_.expect(&pass.inputs[0], pass.tokens);
    pass.for_tokens(pass.tokens, 2 * size_, [&](int t, int thread) {
      float* gated = pass.floats(thread);
      pass.isa->ternary->gate_norm(g + t * D, h + t * D, g_norm_, gate_norm_eps_, size_, gated);
      pass.feed(1, t, gated, thread);
    });
    pass.prepare(1, pass.tokens, "output of the token mixer");
    pass.add_product(pass.row(0));
    pass.mark("token mixer");
  }

 private:
  int size_;
  float gate_norm_eps_;
  Linear i_, f_, g_, o_;
  const float *g_norm_ = nullptr, *lower_bound_ = nullptr;
};

}  // namespace

std::unique_ptr<Mixer> make_mlgru(const MixerParts& parts) {
  return std::make_unique<Mlgru>(parts);
}

}  // namespace nomatmul
