#include "core/embedding.h"

#include <cstring>

namespace nomatmul {

void Embedding::declare(const Description& description, const Isa& isa, Tensors& tensors) {
  vocabulary_ = description.whole("vocabulary", 1, INT32_MAX);
  hidden_ = description.whole("hidden", 1, kMaxElements);
  form_ = dtype_of_form(description.word("form"));
  tensors.add("embedding.weight", form_, static_cast<size_t>(vocabulary_) * hidden_, &table_);
  if (form_ == DType::kI8) tensors.add_floats("embedding.scale", vocabulary_, &scale_);
  const int positions = description.whole("positions", 0, kMaxElements);
  if (positions > 0) {
    tensors.add_floats("positions", static_cast<size_t>(positions) * hidden_, &positions_);
  }
  normed_ = description.has("norm");
  if (normed_) norm_.declare(description.part("norm"), "embedding_norm", isa, tensors);
}

void Embedding::check(const int32_t* ids, size_t count) const {
  for (size_t t = 0; t < count; ++t) {
    if (ids[t] >= 0 && ids[t] < vocabulary_) continue;
    throw std::invalid_argument("token id " + std::to_string(ids[t]) +
                                " is out of range: this model has ids 0 to " +
                                std::to_string(vocabulary_ - 1));
  }
}

bool Embedding::look_up(int32_t id, int place, float* x, float* scratch) const {
  const size_t at = static_cast<size_t>(id) * hidden_;
  float* y = normed_ ? scratch : x;
  if (form_ == DType::kF32) {
    std::memcpy(y, static_cast<const float*>(table_) + at, sizeof(float) * hidden_);
  } else if (form_ == DType::kI8) {
    const int8_t* row = static_cast<const int8_t*>(table_) + at;
    const float scale = scale_[id];
    for (int d = 0; d < hidden_; ++d) y[d] = static_cast<float>(row[d]) * scale;
  } else {
    const uint8_t* row = static_cast<const uint8_t*>(table_) + 2 * at;
    for (int d = 0; d < hidden_; ++d) {
      uint16_t half;
      std::memcpy(&half, row + 2 * d, sizeof half);
      y[d] = float_of_bfloat16(half);
    }
  }
  if (positions_ != nullptr) {
    const float* row = positions_ + static_cast<size_t>(place) * hidden_;
    for (int d = 0; d < hidden_; ++d) y[d] += row[d];
  }
  return !normed_ || norm_.apply(y, x);
}

}  // namespace nomatmul
