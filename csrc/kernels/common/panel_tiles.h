// What products of panels share (common/panels.h says what an instruction set gives): the tiles
// that a product's tokens are prepared as, and how a group's sums become floats.
#pragma once

#include <algorithm>
#include <cstring>

#include "kernels/common/unroll.h"
#include "kernels/panels.h"

namespace nomatmul {
namespace {

// A tile's parts.
struct TileView {
  const float* step;   // [groups][width]
  const int32_t* sum;  // [groups][width]
  const int8_t* q;     // [groups * stored / 4][width][4]
  TileView(const PanelShape& s, const uint8_t* tile, int width)
      : step(reinterpret_cast<const float*>(tile)),
        sum(reinterpret_cast<const int32_t*>(tile + s.head_bytes(width))),
        q(reinterpret_cast<const int8_t*>(tile + 2 * s.head_bytes(width))) {}
};

// Steps and sums of a tile's tokens; tokens that are not there have zeros.
inline void prepare_heads(const PanelShape& s, const int8_t* q, const float* step, int tokens,
                          int width, uint8_t* tile) {
  const int groups = s.groups();
  auto* steps = reinterpret_cast<float*>(tile);
  auto* sums = reinterpret_cast<int32_t*>(tile + s.head_bytes(width));
  for (int t = 0; t < width; ++t) {
    for (int g = 0; g < groups; ++g) {
      int32_t sum = 0;
      if (t < tokens) {
        const int8_t* from = q + static_cast<size_t>(t) * s.k + static_cast<size_t>(g) * s.group;
        for (int i = 0; i < s.group; ++i) sum += from[i];
      }
      steps[g * width + t] = t < tokens ? step[t * groups + g] : 0.0f;
      sums[g * width + t] = sum;
    }
  }
}

// 16 inputs of a token from q on, of which `there` are there, in the order of the panels' vectors:
// those of kTernary by their places in the bytes of a packed row.
inline void order_inputs(PanelForm form, const int8_t* q, int there, int8_t (&to)[16]) {
  int8_t padded[16] = {};
  if (there < 16) {
    std::memcpy(padded, q, there);
    q = padded;
  }
  if (form == PanelForm::kInt8) {
    std::memcpy(to, q, 16);
    return;
  }
  for (int b = 0; b < 4; ++b) {
    for (int j = 0; j < 4; ++j) to[4 * b + j] = q[4 * j + b];
  }
}

// place(token, input) is where 4 inputs of a token go. Inputs behind k and tokens behind the last
// one are zero.
template <class Place>
inline void prepare_inputs(const PanelShape& s, const int8_t* q, int tokens, int width,
                           Place place) {
  const int count = s.groups() * s.stored();
  for (int t = 0; t < width; ++t) {
    const int8_t* row = q + static_cast<size_t>(t) * s.k;
    for (int i = 0; i < count; i += 16) {
      int8_t ordered[16] = {};
      const int there = t < tokens ? std::min(16, s.k - i) : 0;
      if (there > 0) order_inputs(s.form, row + i, there, ordered);
      for (int j = 0; j < 16; j += 4) std::memcpy(place(t, i + j), ordered + j, 4);
    }
  }
}

inline void prepare_tile(const PanelShape& s, const int8_t* q, const float* step, int tokens,
                         int width, uint8_t* tile) {
  prepare_heads(s, q, step, tokens, width, tile);
  uint8_t* to = tile + 2 * s.head_bytes(width);
  prepare_inputs(s, q, tokens, width,
                 [=](int t, int i) { return to + static_cast<size_t>(i) * width + 4 * t; });
}

constexpr int kLanesOf(int vectors) { return kPanelRows / vectors; }

template <class Isa>
NOMATMUL_INLINE inline typename Isa::Floats scales_of(const PanelShape& s, const uint8_t* panel,
                                                      int group, int vector) {
  const size_t at = static_cast<size_t>(group) * kPanelRows + vector * kLanesOf(Isa::kVectors);
  if (s.half_scales) return Isa::load_halves(panel + 2 * at);
  return Isa::load_floats(reinterpret_cast<const float*>(panel) + at);
}

// One group's part of some outputs.
template <class Isa>
NOMATMUL_INLINE inline typename Isa::Floats add_group(typename Isa::Ints sums, int32_t less,
                                                      typename Isa::Floats scales, float step,
                                                      typename Isa::Floats out) {
  return Isa::fma(Isa::floats_of(Isa::less(sums, less)), Isa::times(scales, Isa::splat(step)), out);
}

template <class Isa, PanelForm form>
constexpr int bias_of() {
  return form == PanelForm::kTernary ? 1 : Isa::kInt8Bias;
}

}  // namespace
}  // namespace nomatmul
