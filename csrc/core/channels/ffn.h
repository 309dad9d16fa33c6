// down(act(up)): a channel mixer, and the master leaf beside trees.
#pragma once

#include "core/layers.h"

namespace nomatmul {

class Ffn final : public Mixer {
 public:
  explicit Ffn(const MixerParts& parts);
  void reserve(Pass& pass) const override;
  void run(Pass& pass, const Norm& norm) const override;
  // to [T, D] += the layer of normed rows [T, D]
  void add(Pass& pass, float* normed, float* to) const;

 private:
  void after_norm(Pass& pass, float* to) const;

  Activation activation_;
  Linear up_, down_;
};

}  // namespace nomatmul
