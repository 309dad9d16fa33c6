// Products of panels with few tokens: weights go from memory into products.
#pragma once

#include "kernels/common/panel_tiles.h"

namespace nomatmul {
namespace {

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

}  // namespace
}  // namespace nomatmul
