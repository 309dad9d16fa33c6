#include "core/channels/ffn.h"

#include <cstring>

namespace nomatmul {

Ffn::Ffn(const MixerParts& parts)
    : activation_(activation_of(parts.description.word("activation"))) {
  parts.declare("up_proj", &up_);
  parts.declare("down_proj", &down_);
  if (up_.ternary() || up_.outputs() != down_.inputs()) {
    throw std::invalid_argument("ffn: its linears are ternary, or do not fit together");
  }
}

void Ffn::reserve(Pass& pass) const {
  pass.c.need<float>(static_cast<size_t>(pass.tokens) * up_.outputs());
  pass.reserve(up_, pass.cut(up_, up_.outputs()), 1);
  pass.reserve(down_, pass.cut(down_, down_.outputs()), 1);
}

void Ffn::run(Pass& pass, const Norm& norm) const {
  LinearInput* input = &pass.inputs[0];
  up_.expect(input, pass.tokens);
  feed_norm(pass, norm, {input});
  pass.mark("norms");
  after_norm(pass, input, pass.x.data<float>());
  pass.mark("channel mixer");
}

void Ffn::add(Pass& pass, float* normed, float* to) const {
  LinearInput* input = &pass.inputs[0];
  up_.expect(input, pass.tokens, normed);
  pass.feed_values(input);
  after_norm(pass, input, to);
}

void Ffn::after_norm(Pass& pass, LinearInput* input, float* to) const {
  const size_t M = up_.outputs();
  float* y = pass.c.data<float>();
  pass.prepare({input}, pass.tokens, "channel mixer");
  pass.for_tiles(pass.cut(up_, up_.outputs()),
                 [&](int row, int rows, int first, int m, int thread) {
                   float* tile = pass.floats(thread);
                   pass.tile(*input, row, rows, first, m, tile, rows, thread);
                   pass.isa->dense->activate(activation_, tile, static_cast<size_t>(m) * rows);
                   for (int t = 0; t < m; ++t) {
                     std::memcpy(y + (first + t) * M + row, tile + t * rows, rows * sizeof(float));
                   }
                 });
  LinearInput* inner = &pass.inputs[1];
  down_.expect(inner, pass.tokens, y);
  pass.feed_values(inner);
  pass.prepare({inner}, pass.tokens, "output of the channel mixer");
  pass.add_product(*inner, to);
}

std::unique_ptr<Mixer> make_ffn(const MixerParts& parts) { return std::make_unique<Ffn>(parts); }

}  // namespace nomatmul
