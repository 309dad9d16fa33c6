#include "core/embedding.h"

#include <cstring>

namespace nomatmul {

void Embedding::declare(const Description& description, const Isa& isa, Tensors& tensors) {
  vocabulary_ = description.whole("vocabulary", 1, INT32_MAX);
  hidden_ = description.whole("hidden", 1, kMaxElements);
  if (!description.flag("tied")) declare_table(description, tensors);
  const int positions = description.whole("positions", 0, kMaxElements);
  if (positions > 0) {
    tensors.add_floats("positions", static_cast<size_t>(positions) * hidden_, &positions_);
  }
  normed_ = description.has("norm");
  if (normed_) norm_.declare(description.part("norm"), "embedding_norm", isa, tensors);
}

void Embedding::declare_table(const Description& description, Tensors& tensors) {
  form_ = choose<Form>("form", description.word("form"),
                       {{"int8", Form::kInt8},
                        {"int8-32", Form::kInt8},
                        {"2bit", Form::kTwoBit},
                        {"1.6bit", Form::kBase3},
                        {"f16", Form::kF16},
                        {"bf16", Form::kBF16},
                        {"f32", Form::kF32}});
  const bool packed = form_ == Form::kTwoBit || form_ == Form::kBase3;
  if (packed || form_ == Form::kInt8) {
    const int group = description.whole("scale_group", 0, 256);
    group_ = group == 0 ? hidden_ : group;
    if (hidden_ % group_ != 0) {
      throw std::invalid_argument("embedding: groups of " + std::to_string(group_) +
                                  " do not divide " + std::to_string(hidden_));
    }
    half_scales_ = group > 0 && choose<bool>("scale", description.word("scale"),
                                             {{"f16", true}, {"f32", false}});
    tensors.add("embedding.scale", half_scales_ ? DType::kF16 : DType::kF32,
                static_cast<size_t>(vocabulary_) * (hidden_ / group_), &scale_);
  }
  if (packed) {
    row_bytes_ = row_bytes_of(form_ == Form::kTwoBit ? Packing::kTwoBit : Packing::kBase3, hidden_);
    tensors.add("embedding.packed", DType::kU8, row_bytes_ * vocabulary_, &table_);
    return;
  }
  const DType dtype = form_ == Form::kInt8   ? DType::kI8
                      : form_ == Form::kF16  ? DType::kF16
                      : form_ == Form::kBF16 ? DType::kBF16
                                             : DType::kF32;
  row_bytes_ = width_of(dtype) * hidden_;
  tensors.add("embedding.weight", dtype, static_cast<size_t>(vocabulary_) * hidden_, &table_);
}

void Embedding::check(const int32_t* ids, size_t count) const {
  for (size_t t = 0; t < count; ++t) {
    if (ids[t] >= 0 && ids[t] < vocabulary_) continue;
    throw std::invalid_argument("token id " + std::to_string(ids[t]) +
                                " is out of range: this model has ids 0 to " +
                                std::to_string(vocabulary_ - 1));
  }
}

float Embedding::scale(size_t index) const {
  if (!half_scales_) return static_cast<const float*>(scale_)[index];
  uint16_t half;
  std::memcpy(&half, static_cast<const uint8_t*>(scale_) + 2 * index, sizeof half);
  return float_of_half(half);
}

void Embedding::row(int32_t id, float* y) const {
  if (head_ != nullptr) return head_->values(id, y);
  const uint8_t* row = static_cast<const uint8_t*>(table_) + id * row_bytes_;
  const auto each_half = [&](auto value) {
    for (int d = 0; d < hidden_; ++d) {
      uint16_t half;
      std::memcpy(&half, row + 2 * d, sizeof half);
      y[d] = value(half);
    }
  };
  const auto each_scaled = [&](auto value) {
    const size_t groups = hidden_ / group_;
    for (int d = 0; d < hidden_; ++d) {
      y[d] = static_cast<float>(value(d)) * scale(id * groups + d / group_);
    }
  };
  switch (form_) {
    case Form::kF32:
      std::memcpy(y, row, sizeof(float) * hidden_);
      return;
    case Form::kBF16:
      return each_half(float_of_bfloat16);
    case Form::kF16:
      return each_half(float_of_half);
    case Form::kInt8:
      return each_scaled([=](int d) { return static_cast<int8_t>(row[d]); });
    case Form::kTwoBit:
      return each_scaled([=](int d) { return (row[d / 4] >> d % 4 * 2 & 3) - 1; });
    case Form::kBase3:
      return each_scaled([=](int d) {
        unsigned fraction = row[d / 5];
        for (int i = 0; i < d % 5; ++i) fraction = fraction * 3 & 255;
        return static_cast<int>(fraction * 3 >> 8) - 1;
      });
  }
}

bool Embedding::look_up(int32_t id, int place, float* x, float* scratch) const {
  float* y = normed_ ? scratch : x;
  row(id, y);
  if (positions_ != nullptr) {
    const float* row = positions_ + static_cast<size_t>(place) * hidden_;
    for (int d = 0; d < hidden_; ++d) y[d] += row[d];
  }
  return !normed_ || norm_.apply(y, x);
}

}  // namespace nomatmul
