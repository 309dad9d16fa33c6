// Panels for AMX-int8: activations are the A operand (16 tokens x 64 inputs, laid out by prepare),
// weights the B operand: 16 of a panel's vectors as they are, so a C tile is 16 tokens x 16 rows of
// a panel and a group's sums are scaled without being turned. Groups of 32 inputs make tiles of
// half the depth. Up to four tokens are avx512vnni/'s.
#include "kernels/amx/session.h"
#include "kernels/avx512vnni/panel_vectors.h"

namespace nomatmul {
namespace {

constexpr int kPair = 2;  // panels, and tiles of tokens, at once

int depth_of(const PanelShape& s) { return std::min(s.stored(), 64); }  // inputs of a tile

void prepare(const PanelShape& s, const int8_t* q, const float* step, int tokens, int width,
             uint8_t* tile) {
  if (width < kPanelTile) return prepare_tile(s, q, step, tokens, width, tile);
  prepare_heads(s, q, step, tokens, width, tile);
  uint8_t* to = tile + 2 * s.head_bytes(width);
  const int depth = depth_of(s);
  prepare_inputs(s, q, tokens, width, [=](int t, int i) {
    return to + static_cast<size_t>(i / depth) * depth * kPanelTile + t * depth + i % depth;
  });
}

// Both panels times the first or the second tile of tokens; tiles' numbers are no constants to GCC.
template <PanelForm form>
NOMATMUL_INLINE inline void multiply_first() {
  if constexpr (form == PanelForm::kTernary) {
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
  } else {
    _tile_dpbsud(0, 4, 6);
    _tile_dpbsud(1, 4, 7);
  }
}
template <PanelForm form>
NOMATMUL_INLINE inline void multiply_second() {
  if constexpr (form == PanelForm::kTernary) {
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
  } else {
    _tile_dpbsud(2, 5, 6);
    _tile_dpbsud(3, 5, 7);
  }
}

// One group of a pair of panels and kTiles tiles of tokens: c [kTiles][kPair] tiles.
template <PanelForm form, int kTiles>
NOMATMUL_INLINE inline void multiply_group(const uint8_t* const (&w)[kPair],
                                           const uint8_t* const (&q)[kPair], int steps, int depth,
                                           int32_t* c) {
  const size_t w_step = static_cast<size_t>(depth / 4) * kPanelBytes;
  const size_t q_step = static_cast<size_t>(depth) * kPanelTile;
  _tile_zero(0);
  _tile_zero(1);
  if (kTiles > 1) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int i = 0; i < steps; ++i) {
    _tile_loadd(4, q[0] + i * q_step, depth);
    _tile_loadd(6, w[0] + i * w_step, kPanelBytes);
    _tile_loadd(7, w[1] + i * w_step, kPanelBytes);
    multiply_first<form>();
    if (kTiles > 1) {
      _tile_loadd(5, q[1] + i * q_step, depth);
      multiply_second<form>();
    }
  }
  _tile_stored(0, c, kPanelBytes);
  _tile_stored(1, c + 256, kPanelBytes);
  if (kTiles > 1) {
    _tile_stored(2, c + 512, kPanelBytes);
    _tile_stored(3, c + 768, kPanelBytes);
  }
}

// sums [kTiles * 16][kPair * 16] = or += a group.
template <PanelForm form, int kTiles>
NOMATMUL_INLINE inline void scale_group(const PanelShape& s, const uint8_t* const (&panel)[kPair],
                                        const uint8_t* const (&tile)[kPair], int g,
                                        const int32_t* c, float* sums) {
  for (int p = 0; p < kPair; ++p) {
    const __m512 scales = scales_of<PanelVectors>(s, panel[p], g, 0);
    for (int i = 0; i < kTiles; ++i) {
      const TileView view(s, tile[i], kPanelTile);
      const float* step = view.step + g * kPanelTile;
      const int32_t* sum = view.sum + g * kPanelTile;
      const int32_t* from = c + (i * kPair + p) * 256;
      float* to = sums + (i * kPanelTile * kPair + p) * kPanelRows;
      unrolled<kPanelTile>([&](auto t) NOMATMUL_INLINE {
        __m512i acc = load(from + t * 16);
        if (form == PanelForm::kInt8) acc = PanelVectors::less(acc, 128 * sum[t]);
        float* at = to + t * kPair * kPanelRows;
        const __m512 before = g == 0 ? PanelVectors::zero() : PanelVectors::load_floats(at);
        const __m512 scale = PanelVectors::times(scales, PanelVectors::splat(step[t]));
        PanelVectors::store_floats(at,
                                   PanelVectors::fma(PanelVectors::floats_of(acc), scale, before));
      });
    }
  }
}

// Values -1, 0, 1 of a panel's codes, in vectors of 4 inputs.
void unpack_values(const uint8_t* w, int vectors, uint8_t* to) {
  unpack_codes<PanelVectors>(w, vectors, to);
  for (int v = 0; v < 4 * vectors; ++v, to += kPanelBytes) {
    store(to, _mm512_sub_epi8(load(to), _mm512_set1_epi8(1)));
  }
}

template <PanelForm form, int kTiles>
void groups_of_tokens(const PanelShape& s, const OpenPanels<kPair>& open,
                      const uint8_t* const (&tile)[kPair], float* sums) {
  alignas(64) int32_t c[kPair * kPair * 256];
  const int depth = depth_of(s), steps = s.stored() / depth;
  const size_t w_group = static_cast<size_t>(s.stored()) * kPanelRows;
  for (int g = open.first; g < open.first + open.count; ++g) {
    const size_t w_at = (g - open.first) * w_group;
    const size_t q_at =
        2 * s.head_bytes(kPanelTile) + static_cast<size_t>(g) * s.stored() * kPanelTile;
    const uint8_t* const w[kPair] = {open.w[0] + w_at, open.w[1] + w_at};
    const uint8_t* const q[kPair] = {tile[0] + q_at, tile[1] + q_at};
    multiply_group<form, kTiles>(w, q, steps, depth, c);
    publish(c);
    scale_group<form, kTiles>(s, open.panel, tile, g, c, sums);
  }
}

// All tokens for a pair of panels from output n on; a panel that is not there is the first again.
template <PanelForm form>
void pair_of_panels(const PanelShape& s, const PanelProduct& p, int n) {
  constexpr bool kCodes = form == PanelForm::kTernary;
  constexpr int kWide = kPair * kPanelRows;
  auto* codes = static_cast<uint8_t*>(p.scratch);
  const int at_once = kCodes ? groups_at_once(s) : 1;
  const size_t open_bytes = kCodes ? static_cast<size_t>(at_once) * s.stored() * kPanelRows : 0;
  auto* sums = reinterpret_cast<float*>(codes + kPair * open_bytes);
  const size_t tile_bytes = s.tile_bytes(kPanelTile);
  for (int g = 0; g < s.groups(); g += at_once) {
    OpenPanels<kPair> open;
    open.first = g, open.count = std::min(at_once, s.groups() - g);
    for (int i = 0; i < kPair; ++i) {
      const int row = n + i * kPanelRows < p.rows ? n + i * kPanelRows : n;
      open.panel[i] = p.panels + row / kPanelRows * s.bytes();
      const uint8_t* w = open.panel[i] + s.scale_bytes() + g * s.group_bytes();
      open.w[i] = kCodes ? codes + i * open_bytes : w;
      if (kCodes) unpack_values(w, open.count * s.stored() / 16, codes + i * open_bytes);
    }
    publish(codes);
    for (int first = 0; first < p.m; first += kPair * kPanelTile) {
      const uint8_t* one = p.tiles + first / kPanelTile * tile_bytes;
      float* to = sums + first * kWide;
      if (first + kPanelTile < p.m) {
        groups_of_tokens<form, 2>(s, open, {one, one + tile_bytes}, to);
      } else {
        groups_of_tokens<form, 1>(s, open, {one, one}, to);
      }
    }
  }
  for (int t = 0; t < p.m; ++t) {
    std::memcpy(p.out + t * p.ldo + n, sums + t * kWide,
                std::min(kWide, p.rows - n) * sizeof(float));
  }
}

void product(const PanelShape& s, const PanelProduct& p) {
  if (p.width < kPanelTile) return Panels<PanelVectors>::product(s, p);
  const TileSession session(depth_of(s));
  for (int n = 0; n < p.rows; n += kPair * kPanelRows) {
    if (s.form == PanelForm::kTernary) {
      pair_of_panels<PanelForm::kTernary>(s, p, n);
    } else {
      pair_of_panels<PanelForm::kInt8>(s, p, n);
    }
  }
}

}  // namespace

const PanelKernels kAmxPanels = {PanelVectors::kInt8Bias, prepare,
                                 Panels<PanelVectors>::scratch_bytes, product,
                                 float_product<PanelVectors>};

}  // namespace nomatmul
