// From token ids to rows: a table in float32, bfloat16 or int8, and in encoders a table of
// positions and a norm.
#pragma once

#include "core/layers.h"

namespace nomatmul {

class Embedding {
 public:
  void declare(const Description& description, const Isa& isa, Tensors& tensors);
  int vocabulary() const { return vocabulary_; }
  // Throws std::invalid_argument for an id out of range.
  void check(const int32_t* ids, size_t count) const;
  // x [hidden] of one id at a place of its sequence; scratch [hidden]. False where not finite.
  bool look_up(int32_t id, int place, float* x, float* scratch) const;

 private:
  int vocabulary_ = 0, hidden_ = 0;
  DType form_ = DType::kF32;
  const void* table_ = nullptr;
  const float *scale_ = nullptr, *positions_ = nullptr;
  Norm norm_;
  bool normed_ = false;
};

}  // namespace nomatmul
