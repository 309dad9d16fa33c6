// Products of panels with many tokens: codes are unpacked once for all of them.
#pragma once

#include <type_traits>

#include "kernels/common/panel_tiles.h"

namespace nomatmul {
namespace {

constexpr int kPanelBlock = 512;  // inputs whose unpacked codes stay in the first cache

// Groups of kTernary whose codes are unpacked together.
inline int groups_at_once(const PanelShape& s) { return std::max(1, kPanelBlock / s.stored()); }

template <class Isa>
inline void unpack_codes(const uint8_t* w, int vectors, uint8_t* to) {
  constexpr int kVectors = Isa::kVectors, kBytes = kPanelBytes / kVectors;
  for (int v = 0; v < vectors; ++v, w += kPanelBytes, to += 4 * kPanelBytes) {
    Isa::fetch_ahead(w);
    unrolled<kVectors>([&](auto c) NOMATMUL_INLINE {
      const auto codes = Isa::load(w + c * kBytes);
      unrolled<4>([&](auto b) NOMATMUL_INLINE {
        Isa::store(to + b * kPanelBytes + c * kBytes,
                   Isa::template three<true>(Isa::template lower<2 * decltype(b)::value>(codes)));
      });
    });
  }
}

// Weights of some groups of kPanels panels as vectors of bytes.
template <int kPanels>
struct OpenPanels {
  const uint8_t* panel[kPanels];  // for its scales
  const uint8_t* w[kPanels];
  int first, count;  // groups
};

// kTokens tokens from t on of a tile: sums [kTokens][kPanels * 16] = or +=.
template <class Isa, class Dot, int kPanels, int kTokens>
NOMATMUL_INLINE inline void groups_of_many(const PanelShape& s, const OpenPanels<kPanels>& open,
                                           const TileView& tile, int t, int bias, float* sums) {
  constexpr int kVectors = Isa::kVectors, kColumns = kPanels * kVectors;
  constexpr int kLanes = kLanesOf(kVectors), kBytes = kPanelBytes / kVectors;
  const int vectors = s.stored() / 4;
  const uint8_t* w[kPanels];
  unrolled<kPanels>([&](auto p) NOMATMUL_INLINE { w[p] = open.w[p]; });
  const int8_t* q = tile.q + static_cast<size_t>(open.first) * s.stored() * kPanelTile + 4 * t;
  for (int g = open.first; g < open.first + open.count; ++g) {
    typename Dot::Sum acc[kColumns][kTokens];
    unrolled<kColumns>([&](auto c) NOMATMUL_INLINE {
      unrolled<kTokens>([&](auto i) NOMATMUL_INLINE { acc[c][i] = Dot::start(); });
    });
    for (int v = 0; v < vectors; ++v, q += 4 * kPanelTile) {
      typename Isa::Bytes weights[kColumns];
      unrolled<kColumns>([&](auto c) NOMATMUL_INLINE {
        weights[c] = Isa::load(w[c / kVectors] + c % kVectors * kBytes);
      });
      unrolled<kTokens>([&](auto i) NOMATMUL_INLINE {
        const auto four = Isa::splat4(q + 4 * i);
        unrolled<kColumns>([&](auto c) NOMATMUL_INLINE { Dot::add(acc[c][i], weights[c], four); });
      });
      unrolled<kPanels>([&](auto p) NOMATMUL_INLINE { w[p] += kPanelBytes; });
    }
    const float* step = tile.step + g * kPanelTile + t;
    const int32_t* sum = tile.sum + g * kPanelTile + t;
    unrolled<kColumns>([&](auto c) NOMATMUL_INLINE {
      const auto scales = scales_of<Isa>(s, open.panel[c / kVectors], g, c % kVectors);
      unrolled<kTokens>([&](auto i) NOMATMUL_INLINE {
        float* to = sums + (i * kColumns + c) * kLanes;
        const auto before = g == 0 ? Isa::zero() : Isa::load_floats(to);
        Isa::store_floats(
            to, add_group<Isa>(Dot::total(acc[c][i]), bias * sum[i], scales, step[i], before));
      });
    });
  }
}

// All tokens for kPanels panels from output n on.
template <class Isa, PanelForm form, int kPanels>
void panels_of_many(const PanelShape& s, const PanelProduct& p, int n) {
  constexpr bool kCodes = form == PanelForm::kTernary;
  using Dot = std::conditional_t<kCodes, typename Isa::Ternary, typename Isa::Int8>;
  constexpr int kWide = kPanels * kPanelRows;
  auto* codes = static_cast<uint8_t*>(p.scratch);
  const int at_once = kCodes ? groups_at_once(s) : 1;
  const size_t open_bytes = static_cast<size_t>(at_once) * s.stored() * kPanelRows;
  auto* sums = reinterpret_cast<float*>(codes + (kCodes ? kPanels * open_bytes : 0));
  const size_t tile_bytes = s.tile_bytes(kPanelTile);
  for (int g = 0; g < s.groups(); g += at_once) {
    OpenPanels<kPanels> open;
    open.first = g, open.count = std::min(at_once, s.groups() - g);
    for (int i = 0; i < kPanels; ++i) {
      open.panel[i] = p.panels + (n / kPanelRows + i) * s.bytes();
      const uint8_t* w = open.panel[i] + s.scale_bytes() + g * s.group_bytes();
      open.w[i] = kCodes ? codes + i * open_bytes : w;
      if (kCodes) unpack_codes<Isa>(w, open.count * s.stored() / 16, codes + i * open_bytes);
    }
    for (int first = 0; first < p.m; first += kPanelTile) {
      const TileView tile(s, p.tiles + first / kPanelTile * tile_bytes, kPanelTile);
      for (int t = 0; t < std::min(kPanelTile, p.m - first); t += Isa::kTokens) {
        groups_of_many<Isa, Dot, kPanels, Isa::kTokens>(s, open, tile, t, bias_of<Isa, form>(),
                                                        sums + (first + t) * kWide);
      }
    }
  }
  for (int t = 0; t < p.m; ++t) {
    std::memcpy(p.out + t * p.ldo + n, sums + t * kWide,
                std::min(kWide, p.rows - n) * sizeof(float));
  }
}

}  // namespace
}  // namespace nomatmul
