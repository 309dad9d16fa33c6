#include "core/linears/panel_weights.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels/common/half.h"

namespace nomatmul {
namespace {

// A row of five values a byte as one of two bits.
void two_bits_of(const uint8_t* from, int k, uint8_t* to) {
  std::memset(to, 0, (k + 3) / 4);
  for (int e = 0; e < k; e += 5) {
    unsigned fraction = from[e / 5];
    for (int i = e; i < std::min(k, e + 5); ++i) {
      fraction *= 3;
      to[i / 4] = static_cast<uint8_t>(to[i / 4] | fraction >> 8 << i % 4 * 2);
      fraction &= 255;
    }
  }
}

}  // namespace

PanelWeights::PanelWeights(const PanelShape& shape, int int8_bias, int rows, int halves,
                           uint8_t* room)
    : shape_(shape), bias_(int8_bias), rows_(rows), half_(rows / halves) {
  panels_ = (half_ + kPanelRows - 1) / kPanelRows;
  if (room == nullptr) block_ = Block(bytes(shape, rows, halves));
  room_ = room == nullptr ? block_.as<uint8_t>() : room;
}

uint8_t* PanelWeights::codes_of(int row) const {
  return const_cast<uint8_t*>(panel_of(row)) + shape_.scale_bytes() + row % half_ % kPanelRows * 4;
}

void PanelWeights::fill_codes(Packing packing, const uint8_t* rows) {
  const int words = shape_.k / 16;
  const size_t row_bytes = row_bytes_of(packing, shape_.k);
  std::vector<uint8_t> two_bits(packing == Packing::kBase3 ? words * 4 * kPanelRows : 0);
  for (int first = 0; first < rows_;) {  // a panel at a time: vectors are written whole
    const int count = std::min(kPanelRows, half_ - first % half_);
    const uint8_t* from = rows + first * row_bytes;
    size_t stride = row_bytes;
    if (packing == Packing::kBase3) {
      stride = static_cast<size_t>(words) * 4;
      for (int r = 0; r < count; ++r) {
        two_bits_of(from + r * row_bytes, shape_.k, two_bits.data() + r * stride);
      }
      from = two_bits.data();
    }
    uint8_t* to = codes_of(first);
    for (int word = 0; word < words; ++word, from += 4, to += kPanelBytes) {
      for (int r = 0; r < count; ++r) std::memcpy(to + 4 * r, from + r * stride, 4);
    }
    first += count;
  }
}

void PanelWeights::fill_int8(const int8_t* rows) {
  const int k = shape_.k, whole = k / 4 * 4;
  const uint32_t bias = static_cast<uint32_t>(bias_) * 0x01010101u;
  const auto biased = [=](const int8_t* from, int bytes) {
    uint32_t four = 0;
    std::memcpy(&four, from, bytes);
    return four ^ bias;  // a bias of 128 turns the sign's bit
  };
  for (int first = 0; first < rows_;) {
    const int count = std::min(kPanelRows, half_ - first % half_);
    const int8_t* from = rows + static_cast<size_t>(first) * k;
    uint8_t* to = codes_of(first);
    for (int i = 0; i < k; i += 4, to += kPanelBytes) {
      for (int r = 0; r < count; ++r) {
        const uint32_t four = biased(from + static_cast<size_t>(r) * k + i, i < whole ? 4 : k - i);
        std::memcpy(to + 4 * r, &four, 4);
      }
    }
    first += count;
  }
}

void PanelWeights::fill_scales(const void* scales) {
  const int groups = shape_.groups();
  const size_t width = shape_.half_scales ? 2 : 4;
  for (int row = 0; row < rows_; ++row) {
    const auto* from = static_cast<const uint8_t*>(scales) + row * groups * width;
    auto* to = const_cast<uint8_t*>(panel_of(row)) + row % half_ % kPanelRows * width;
    for (int g = 0; g < groups; ++g) {
      std::memcpy(to + g * kPanelRows * width, from + g * width, width);
    }
  }
}

float PanelWeights::scale_of(int row, int group) const {
  const size_t at = static_cast<size_t>(group) * kPanelRows + row % half_ % kPanelRows;
  if (!shape_.half_scales) {
    float scale;
    std::memcpy(&scale, panel_of(row) + 4 * at, sizeof scale);
    return scale;
  }
  uint16_t half;
  std::memcpy(&half, panel_of(row) + 2 * at, sizeof half);
  return float_of_half(half);
}

void PanelWeights::values(int row, float* to) const {
  const bool ternary = shape_.form == PanelForm::kTernary;
  const uint8_t* lane = codes_of(row);
  float scale = 0;
  for (int i = 0; i < shape_.k; ++i) {
    if (i % shape_.group == 0) scale = scale_of(row, i / shape_.group);
    const int place = ternary ? i % 16 / 4 : i % 4;
    const int byte = lane[static_cast<size_t>(i / shape_.vector_inputs()) * kPanelBytes + place];
    const int value = ternary ? (byte >> i % 4 * 2 & 3) - 1 : static_cast<int8_t>(byte ^ bias_);
    to[i] = static_cast<float>(value) * scale;
  }
}

}  // namespace nomatmul
