// Products of panels (kernels/panels.h), written once over vectors of 16, 8 or 4 of a panel's rows:
// a panel is Isa::kVectors of them, each a column of a register tile. An instruction set is a
// struct of
//   Bytes    4 bytes a row;   load(p), splat4(p) (the same 4 in every row), store(p, Bytes)
//   Ints, Floats              none() of zeros, floats_of(Ints), less(Ints, int32), plus(Ints,
//   Ints),
//                             fourth(Ints)
//   three<kLow>(Bytes)        codes at bits 0 (kLow) or, 4 times too large, 2 of each byte
//   lower<kBits>(Bytes)       each byte's bits from kBits on at 0.., whatever stands above
//   Ternary, Int8             {Sum, start(), add(Sum&, Bytes weights, Bytes q), total(Sum) -> Ints}
//   kRun     vectors of two bits whose products one Ternary::Sum may take
//   kPanels, kTokens          sums of so many panels and tokens stay in registers
//   zero(), splat(float), times(a, b), fma(a, b, c), load_floats(p), store_floats(p, Floats),
//   load_halves(p), fetch_ahead(p), kInt8Bias
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

// --- few tokens: weights go from memory into products ------------------------------------------

// total += the sums of one group of two-bit codes.
template <class Isa, int kTokens>
NOMATMUL_INLINE inline void group_of_few(const uint8_t* w, int vectors, const int8_t* q,
                                         typename Isa::Ints (&total)[kTokens][Isa::kVectors]) {
  using Dot = typename Isa::Ternary;
  constexpr int kVectors = Isa::kVectors, kBytes = kPanelBytes / kVectors;
  // of each place of the codes: a chain of sums alone would wait for the product's latency
  constexpr int kChains = kTokens == 1 && kVectors == 1 ? 2 : 1, kLast = kChains - 1;
  for (int from = 0; from < vectors; from += Isa::kRun) {
    typename Dot::Sum low[kTokens][kVectors][kChains], high[kTokens][kVectors][kChains];
    unrolled<kTokens * kVectors * kChains>([&](auto i) NOMATMUL_INLINE {
      constexpr int kI = decltype(i)::value;
      constexpr int t = kI / (kVectors * kChains), c = kI / kChains % kVectors, n = kI % kChains;
      low[t][c][n] = Dot::start();
      high[t][c][n] = Dot::start();
    });
    const int end = std::min(vectors, from + Isa::kRun);
    for (int v = from; v < end; ++v, w += kPanelBytes, q += 16 * kTokens) {
      Isa::fetch_ahead(w);
      unrolled<kVectors>([&](auto c) NOMATMUL_INLINE {
        const auto near = Isa::load(w + c * kBytes);
        const auto far = Isa::template lower<4>(near);
        const auto c0 = Isa::template three<true>(near), c1 = Isa::template three<false>(near);
        const auto c2 = Isa::template three<true>(far), c3 = Isa::template three<false>(far);
        unrolled<kTokens>([&](auto t) NOMATMUL_INLINE {
          Dot::add(low[t][c][0], c0, Isa::splat4(q + 4 * t));
          Dot::add(high[t][c][0], c1, Isa::splat4(q + 4 * (kTokens + t)));
          Dot::add(low[t][c][kLast], c2, Isa::splat4(q + 4 * (2 * kTokens + t)));
          Dot::add(high[t][c][kLast], c3, Isa::splat4(q + 4 * (3 * kTokens + t)));
        });
      });
    }
    unrolled<kTokens>([&](auto t) NOMATMUL_INLINE {
      unrolled<kVectors>([&](auto c) NOMATMUL_INLINE {
        unrolled<kChains>([&](auto n) NOMATMUL_INLINE {
          const auto sum =
              Isa::plus(Dot::total(low[t][c][n]), Isa::fourth(Dot::total(high[t][c][n])));
          total[t][c] = Isa::plus(total[t][c], sum);
        });
      });
    });
  }
}

// total += the sums of one group of int8.
template <class Isa, int kTokens>
NOMATMUL_INLINE inline void int8_of_few(const uint8_t* w, int vectors, const int8_t* q,
                                        typename Isa::Ints (&total)[kTokens][Isa::kVectors]) {
  using Dot = typename Isa::Int8;
  constexpr int kVectors = Isa::kVectors, kBytes = kPanelBytes / kVectors;
  constexpr int kChains = kVectors > 1 ? 1 : kTokens == 1 ? 4 : kTokens == 2 ? 2 : 1;
  typename Dot::Sum sums[kTokens][kVectors][kChains];
  unrolled<kTokens * kVectors * kChains>([&](auto i) NOMATMUL_INLINE {
    constexpr int kI = decltype(i)::value;
    sums[kI / (kVectors * kChains)][kI / kChains % kVectors][kI % kChains] = Dot::start();
  });
  for (int v = 0; v < vectors;
       v += kChains, w += kChains * kPanelBytes, q += 4 * kChains * kTokens) {
    unrolled<kChains>([&](auto n) NOMATMUL_INLINE {
      Isa::fetch_ahead(w + n * kPanelBytes);
      unrolled<kVectors>([&](auto c) NOMATMUL_INLINE {
        const auto weights = Isa::load(w + n * kPanelBytes + c * kBytes);
        unrolled<kTokens>([&](auto t) NOMATMUL_INLINE {
          Dot::add(sums[t][c][n], weights, Isa::splat4(q + 4 * (n * kTokens + t)));
        });
      });
    });
  }
  unrolled<kTokens>([&](auto t) NOMATMUL_INLINE {
    unrolled<kVectors>([&](auto c) NOMATMUL_INLINE {
      unrolled<kChains>([&](auto n) NOMATMUL_INLINE {
        total[t][c] = Isa::plus(total[t][c], Dot::total(sums[t][c][n]));
      });
    });
  });
}

template <class Isa, PanelForm form, int kTokens>
void panels_of_few(const PanelShape& s, const PanelProduct& p) {
  constexpr int kVectors = Isa::kVectors, kLanes = kLanesOf(kVectors);
  const TileView tile(s, p.tiles, kTokens);
  const size_t panel_bytes = s.bytes(), group_bytes = s.group_bytes();
  const int groups = s.groups(), vectors = s.stored() / s.vector_inputs();
  const uint8_t* panel = p.panels;
  for (int n = 0; n < p.rows; n += kPanelRows, panel += panel_bytes) {
    const uint8_t* w = panel + s.scale_bytes();
    typename Isa::Floats out[kTokens][kVectors];
    unrolled<kTokens>([&](auto t) NOMATMUL_INLINE {
      unrolled<kVectors>([&](auto c) NOMATMUL_INLINE { out[t][c] = Isa::zero(); });
    });
    for (int g = 0; g < groups; ++g, w += group_bytes) {
      const int8_t* q = tile.q + static_cast<size_t>(g) * s.stored() * kTokens;
      typename Isa::Ints sums[kTokens][kVectors];
      unrolled<kTokens>([&](auto t) NOMATMUL_INLINE {
        unrolled<kVectors>([&](auto c) NOMATMUL_INLINE { sums[t][c] = Isa::none(); });
      });
      if constexpr (form == PanelForm::kTernary) {
        group_of_few<Isa, kTokens>(w, vectors, q, sums);
      } else {
        int8_of_few<Isa, kTokens>(w, vectors, q, sums);
      }
      unrolled<kVectors>([&](auto c) NOMATMUL_INLINE {
        const auto scales = scales_of<Isa>(s, panel, g, c);
        unrolled<kTokens>([&](auto t) NOMATMUL_INLINE {
          const int at = g * kTokens + t;
          out[t][c] = add_group<Isa>(sums[t][c], bias_of<Isa, form>() * tile.sum[at], scales,
                                     tile.step[at], out[t][c]);
        });
      });
    }
    unrolled<kTokens>([&](auto t) NOMATMUL_INLINE {
      float lanes[kPanelRows];
      unrolled<kVectors>([&](auto c)
                             NOMATMUL_INLINE { Isa::store_floats(lanes + c * kLanes, out[t][c]); });
      std::memcpy(p.out + t * p.ldo + n, lanes, std::min(kPanelRows, p.rows - n) * sizeof(float));
    });
  }
}

// --- many tokens: codes are unpacked once for all of them --------------------------------------

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

template <class Isa, PanelForm form>
void panels_product(const PanelShape& s, const PanelProduct& p) {
  if (p.width < kPanelTile) {
    unrolled<kPanelFewTokens>([&](auto i) {
      if (p.m == i + 1) panels_of_few<Isa, form, i + 1>(s, p);
    });
    return;
  }
  int n = 0;
  for (; n + (Isa::kPanels - 1) * kPanelRows < p.rows; n += Isa::kPanels * kPanelRows) {
    panels_of_many<Isa, form, Isa::kPanels>(s, p, n);
  }
  for (; n < p.rows; n += kPanelRows) panels_of_many<Isa, form, 1>(s, p, n);
}

template <class Isa>
struct Panels {
  static size_t scratch_bytes(const PanelShape& s, int m) {
    if (m <= kPanelFewTokens) return 0;
    const bool codes = s.form == PanelForm::kTernary;
    const size_t open = codes ? static_cast<size_t>(groups_at_once(s)) * s.stored() : 0;
    const size_t tokens = (static_cast<size_t>(m) + kPanelTile - 1) / kPanelTile * kPanelTile;
    return Isa::kPanels * kPanelRows * (open + tokens * sizeof(float));
  }
  static void product(const PanelShape& s, const PanelProduct& p) {
    if (s.form == PanelForm::kTernary) return panels_product<Isa, PanelForm::kTernary>(s, p);
    panels_product<Isa, PanelForm::kInt8>(s, p);
  }
};

}  // namespace
}  // namespace nomatmul
