// Products of causal models' linears whose scales belong to rows or to groups of a row's inputs,
// and exact products of float rows: one table of function pointers per instruction set.
//
// Weights lie in panels of 16 rows, which are the lanes of one or several vectors: a group's sums
// of 16 rows are scaled in one go, and one token reads a panel as one stream. A panel is its
// scales, [groups][16 rows], filled up to 64 bytes, then its codes in vectors of 64 bytes, 4 of
// each row:
//   kTernary: codes = value + 1, 16 inputs a vector in the order in which a packed row of two bits
//   has
//             them: bits 2 b of byte j of a row's 4 bytes are input 4 j + b;
//   kInt8:    4 inputs a vector, value + int8_bias of the table.
// Rows behind the last one and inputs behind k have value 0 and scale 0.
//
// Legend: m tokens, k inputs, groups of `group` inputs.
#pragma once

#include <cstddef>
#include <cstdint>

namespace nomatmul {

constexpr int kPanelRows = 16;
constexpr int kPanelBytes = 64;     // of a vector: 4 of each row
constexpr int kPanelFewTokens = 4;  // up to so many, weights go from memory into products
constexpr int kPanelTile = 16;      // tokens that are prepared together where they are more

enum class PanelForm : int { kTernary = 0, kInt8 = 1 };

struct PanelShape {
  PanelForm form;
  int k;
  int group;         // 32, 64, 128 or 256, a divisor of k; of kInt8 also k itself
  bool half_scales;  // float16, not float32

  int groups() const { return k / group; }
  // Inputs of a group as they are stored.
  int stored() const { return group == 32 ? 32 : (group + 63) / 64 * 64; }
  int vector_inputs() const { return form == PanelForm::kTernary ? 16 : 4; }
  size_t scale_bytes() const {
    const size_t bytes = static_cast<size_t>(groups()) * kPanelRows * (half_scales ? 2 : 4);
    return (bytes + 63) / 64 * 64;
  }
  size_t group_bytes() const {
    return static_cast<size_t>(stored() / vector_inputs()) * kPanelBytes;
  }
  size_t bytes() const { return scale_bytes() + groups() * group_bytes(); }

  // A tile of prepared tokens, `width` of them: steps and sums of q, [groups][width], filled up to
  // 64 bytes, then q.
  size_t head_bytes(int width) const {
    return (static_cast<size_t>(groups()) * width * 4 + 63) / 64 * 64;
  }
  size_t tile_bytes(int width) const {
    const size_t q = static_cast<size_t>(groups()) * stored() * width;
    return 2 * head_bytes(width) + (q + 63) / 64 * 64;
  }
};

// How many tokens a tile has, of m in all.
constexpr int panel_width(int m) { return m <= kPanelFewTokens ? m : kPanelTile; }

// out[t * ldo + r] of `rows` rows from the first panel on and m tokens, 1 to 256 of tiles.
struct PanelProduct {
  const uint8_t* panels;
  int rows, m, width;
  const uint8_t* tiles;
  float* out;
  size_t ldo;
  void* scratch;
};

// Float rows [rows, k], one behind the other.
enum class FloatForm : int { kF32 = 0, kBF16 = 1, kF16 = 2 };
struct FloatProduct {
  FloatForm form;
  const void* w;
  int rows, m, k;
  const float* x;  // [m, k]
  float* out;
  size_t ldo;
};

struct PanelKernels {
  int int8_bias;

  // Up to `width` tokens of q, int8 [tokens, k] within -127..127, and their steps [tokens, groups]
  // into a tile, aligned to 64 bytes; its layout is the ISA's own.
  void (*prepare)(const PanelShape&, const int8_t* q, const float* step, int tokens, int width,
                  uint8_t* tile);

  size_t (*scratch_bytes)(const PanelShape&, int m);  // of one thread, aligned to 64 bytes

  // With acc the exact int32 sum of a group's products, in the order of the groups and from 0:
  // out = fma(float(acc), scale * step, out), with the same bits on every ISA.
  void (*product)(const PanelShape&, const PanelProduct&);

  // lane[i % 16] = fma(x[i], w[i], lane[i % 16]) for i = 0.., from 0; then lane i + lane i + 8, +
  // 4,
  // + 2, + 1.
  void (*float_product)(const FloatProduct&);
};

// Each is defined in <isa>/panels.cc.
extern const PanelKernels kScalarPanels, kAvx2Panels, kAvx512VnniPanels, kAmxPanels, kNeonPanels;

}  // namespace nomatmul
