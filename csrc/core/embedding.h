// From token ids to rows: a table of floats, of int8 or of ternary values with their scales, and in
// encoders a table of positions and a norm. Where the head is tied to it, the head has the table.
#pragma once

#include "core/layers.h"

namespace nomatmul {

class Embedding {
 public:
  void declare(const Description& description, const Isa& isa, Tensors& tensors);
  // The head that has the table of a tied embedding.
  void tie(const Linear* head) { head_ = head; }
  int vocabulary() const { return vocabulary_; }
  // Throws std::invalid_argument for an id out of range.
  void check(const int32_t* ids, size_t count) const;
  // x [hidden] of one id at a place of its sequence; scratch [hidden]. False where not finite.
  bool look_up(int32_t id, int place, float* x, float* scratch) const;

 private:
  enum class Form { kF32, kBF16, kF16, kInt8, kTwoBit, kBase3 };
  void declare_table(const Description& description, Tensors& tensors);
  void row(int32_t id, float* y) const;
  float scale(size_t index) const;

  int vocabulary_ = 0, hidden_ = 0;
  Form form_ = Form::kF32;
  size_t row_bytes_ = 0;
  int group_ = 0;  // inputs that share a scale; 0: there is none
  bool half_scales_ = false;
  const void *table_ = nullptr, *scale_ = nullptr;
  const Linear* head_ = nullptr;
  const float* positions_ = nullptr;
  Norm norm_;
  bool normed_ = false;
};

}  // namespace nomatmul
