// Keeping keys and values in pages (kernels/attention.h), written once; common/attention_ops.h says
// what an instruction set gives.
#pragma once

#include <algorithm>
#include <cstring>

#include "kernels/attention.h"

namespace nomatmul {
namespace {

constexpr int kWide = 16;  // floats of a W

// to[i * stride] = float16 of from[i]. False where one of them is not finite.
template <class Isa>
inline bool keep_halves(const float* from, int count, uint16_t* to, size_t stride) {
  bool finite = true;
  for (int i = 0; i < count; i += kWide) {
    const int some = std::min(kWide, count - i);
    float wide[kWide] = {};
    uint16_t halves[kWide];
    std::memcpy(wide, from + i, some * sizeof(float));
    Isa::to_halves(wide, halves);
    for (int j = 0; j < some; ++j) {
      finite = finite && (halves[j] & 0x7c00) != 0x7c00;
      to[(i + j) * stride] = halves[j];
    }
  }
  return finite;
}

// to[i * stride] = from[i] / step to nearest even, step = (largest size) / 127, at least 1e-5 /
// 127.
inline bool keep_bytes(const float* from, int count, int8_t* to, size_t stride, float* step) {
  float top = 1e-5f, poison = 0;
  for (int i = 0; i < count; ++i) {
    const float size = from[i] < 0 ? -from[i] : from[i];
    top = size > top ? size : top;
    poison += from[i] * 0.0f;
  }
  *step = top / 127.0f;
  const float scale = 127.0f / top;
  if (poison != 0.0f) return false;
  for (int i = 0; i < count; ++i) {
    const float rounded = (from[i] * scale + 12582912.0f) - 12582912.0f;  // 1.5 * 2^23
    to[i * stride] = static_cast<int8_t>(rounded);
  }
  return true;
}

inline bool keep_floats(const float* from, int count, float* to, size_t stride) {
  float poison = 0;  // 0 * inf and 0 * NaN are NaN
  for (int i = 0; i < count; ++i) {
    poison += from[i] * 0.0f;
    to[i * stride] = from[i];
  }
  return poison == 0.0f;
}

template <class Isa>
bool keep(const StripLayout& layout, uint8_t* strip, int slot, const float* k, const float* v) {
  const int e = layout.head_size;
  uint8_t* values = strip + layout.values() + slot * layout.value_bytes();
  if (layout.form == KvForm::kFloat) {
    const bool finite = keep_floats(k, e, reinterpret_cast<float*>(strip) + slot, kPagePositions);
    return keep_floats(v, e, reinterpret_cast<float*>(values), 1) && finite;
  }
  if (layout.form == KvForm::kHalf) {
    auto* keys = reinterpret_cast<uint16_t*>(strip) + slot;
    const bool finite = keep_halves<Isa>(k, e, keys, kPagePositions);
    return keep_halves<Isa>(v, e, reinterpret_cast<uint16_t*>(values), 1) && finite;
  }
  auto* scales = reinterpret_cast<float*>(strip + layout.scales()) + slot;
  const bool finite =
      keep_bytes(k, e, reinterpret_cast<int8_t*>(strip) + slot, kPagePositions, scales);
  return keep_bytes(v, e, reinterpret_cast<int8_t*>(values), 1, scales + kPagePositions) && finite;
}

}  // namespace
}  // namespace nomatmul
