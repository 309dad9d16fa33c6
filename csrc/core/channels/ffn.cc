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
  pass.reserve(up_);
  pass.reserve(down_);
}

void Ffn::run(Pass& pass, const Norm& norm) const {
  feed_norm(pass, norm, {&up_}, "channel mixer");
  after_norm(pass, pass.row(0));
  pass.mark("channel mixer");
}

void Ffn::add(Pass& pass, float* normed, float* to) const {
  pass.feed_values(up_, normed, "channel mixer");
  after_norm(pass, to);
}

void Ffn::after_norm(Pass& pass, float* to) const {
  const size_t M = up_.outputs();
  float* y = pass.c.data<float>();
  pass.for_tiles(pass.cut(up_, up_.outputs()),
                 [&](int row, int rows, int first, int m, int thread) {
                   float* tile = pass.floats(thread);
                   pass.tile(pass.inputs[0], row, rows, first, m, tile, rows, thread);
                   pass.isa->dense->activate(activation_, tile, static_cast<size_t>(m) * rows);
                   for (int t = 0; t < m; ++t) {
                     std::memcpy(y + (first + t) * M + row, tile + t * rows, rows * sizeof(float));
                   }
                 });
  pass.add_linear(down_, y, "output of the channel mixer", to);
}

std::unique_ptr<Mixer> make_ffn(const MixerParts& parts) { return std::make_unique<Ffn>(parts); }

}  // namespace nomatmul
