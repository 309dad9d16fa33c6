// AVX512-VNNI and AMX in software, for tests on machines without them: SIMDe's portable forms under
// the intrinsics' own names, the few that SIMDe lacks, and AMX tiles as plain arrays.
// Only compiled with NOMATMUL_EMULATE, and never into the package.
#pragma once

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx2.h>
#include <simde/x86/avx512.h>

#include <cassert>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels/common/half.h"

#undef _mm512_maskz_loadu_epi8
#undef _mm512_mask_storeu_epi32
#undef _mm512_mask_storeu_ps
#undef _mm512_srai_epi32
#undef _mm512_cvtepi32_ps
#define _mm512_cvtepi32_ps emulated_cvtepi32_ps
#define _mm512_srai_epi32 emulated_srai_epi32
#define _mm512_maskz_loadu_epi8 emulated_maskz_loadu_epi8
#define _mm512_mask_storeu_epi32 emulated_mask_storeu_epi32
#define _mm512_mask_storeu_ps emulated_mask_storeu_ps

// Masked-off bytes are not touched, as on hardware: AddressSanitizer would see a step too far.
inline simde__m512i emulated_maskz_loadu_epi8(uint64_t mask, const void* p) {
  uint8_t bytes[64] = {};
  for (int i = 0; i < 64; ++i) {
    if ((mask >> i) & 1) bytes[i] = static_cast<const uint8_t*>(p)[i];
  }
  return simde_mm512_loadu_si512(bytes);
}

inline void emulated_mask_storeu_epi32(void* p, uint32_t mask, simde__m512i v) {
  int32_t lanes[16];
  simde_mm512_storeu_si512(lanes, v);
  for (int i = 0; i < 16; ++i) {
    if ((mask >> i) & 1) std::memcpy(static_cast<int32_t*>(p) + i, lanes + i, sizeof lanes[i]);
  }
}

inline void emulated_mask_storeu_ps(void* p, uint32_t mask, simde__m512 v) {
  emulated_mask_storeu_epi32(p, mask, simde_mm512_castps_si512(v));
}

inline simde__m512i emulated_srai_epi32(simde__m512i v, unsigned count) {
  int32_t lanes[16];
  simde_mm512_storeu_si512(lanes, v);
  for (int32_t& lane : lanes) lane >>= count;
  return simde_mm512_loadu_si512(lanes);
}

inline simde__m512 emulated_cvtepi32_ps(simde__m512i v) {
  int32_t lanes[16];
  float floats[16];
  simde_mm512_storeu_si512(lanes, v);
  for (int i = 0; i < 16; ++i) floats[i] = static_cast<float>(lanes[i]);
  return simde_mm512_loadu_ps(floats);
}

// SIMDe's product and sum would be rounded twice, and it lacks these conversions to 512 bits.
#undef _mm512_cvtepi8_epi32
#undef _mm512_fmadd_ps
#undef _mm512_cvtph_ps
#undef _mm512_cvtps_ph
#define _mm512_cvtepi8_epi32 emulated_cvtepi8_epi32
#define _mm512_fmadd_ps emulated_fmadd_ps
#define _mm512_cvtph_ps emulated_cvtph_ps
#define _mm512_cvtps_ph emulated_cvtps_ph
#define _mm512_cvtepu16_epi32 emulated_cvtepu16_epi32

inline simde__m512i emulated_cvtepi8_epi32(simde__m128i v) {
  int8_t narrow[16];
  int32_t wide[16];
  std::memcpy(narrow, &v, sizeof narrow);
  for (int i = 0; i < 16; ++i) wide[i] = narrow[i];
  return simde_mm512_loadu_si512(wide);
}

inline simde__m512i emulated_cvtepu16_epi32(simde__m256i v) {
  uint16_t narrow[16];
  uint32_t wide[16];
  std::memcpy(narrow, &v, sizeof narrow);
  for (int i = 0; i < 16; ++i) wide[i] = narrow[i];
  return simde_mm512_loadu_si512(wide);
}

inline simde__m512 emulated_fmadd_ps(simde__m512 a, simde__m512 b, simde__m512 c) {
  float x[16], y[16], z[16];
  simde_mm512_storeu_ps(x, a);
  simde_mm512_storeu_ps(y, b);
  simde_mm512_storeu_ps(z, c);
  for (int i = 0; i < 16; ++i) z[i] = std::fma(x[i], y[i], z[i]);
  return simde_mm512_loadu_ps(z);
}

inline simde__m512 emulated_cvtph_ps(simde__m256i v) {
  uint16_t halves[16];
  float floats[16];
  std::memcpy(halves, &v, sizeof halves);
  for (int i = 0; i < 16; ++i) floats[i] = nomatmul::float_of_half(halves[i]);
  return simde_mm512_loadu_ps(floats);
}

// To nearest even whatever the mode says: no kernel asks for another.
inline simde__m256i emulated_cvtps_ph(simde__m512 v, int) {
  float floats[16];
  uint16_t halves[16];
  simde_mm512_storeu_ps(floats, v);
  for (int i = 0; i < 16; ++i) halves[i] = nomatmul::half_of_float(floats[i]);
  simde__m256i out;
  std::memcpy(&out, halves, sizeof out);
  return out;
}

// --- AMX ---------------------------------------------------------------------------------------

// One thread's tile registers. Loaded without a configuration, or beyond it, hardware faults; here
// an assertion does.
struct EmulatedTiles {
  bool configured = false;
  uint8_t rows[8] = {};
  uint16_t row_bytes[8] = {};
  uint8_t data[8][16][64] = {};
};
inline thread_local EmulatedTiles emulated_tiles;

inline void emulated_tile_loadconfig(const void* config) {
  const auto* bytes = static_cast<const uint8_t*>(config);
  assert(bytes[0] == 1);
  EmulatedTiles& tiles = emulated_tiles;
  tiles = EmulatedTiles();
  tiles.configured = true;
  for (int i = 0; i < 8; ++i) {
    std::memcpy(&tiles.row_bytes[i], bytes + 16 + 2 * i, 2);
    tiles.rows[i] = bytes[48 + i];
    assert(tiles.row_bytes[i] <= 64 && tiles.rows[i] <= 16);
  }
}

inline void emulated_tile_release() { emulated_tiles.configured = false; }

inline void emulated_tile_zero(int tile) {
  assert(emulated_tiles.configured);
  std::memset(emulated_tiles.data[tile], 0, sizeof emulated_tiles.data[tile]);
}

inline void emulated_tile_loadd(int tile, const void* base, size_t stride) {
  EmulatedTiles& tiles = emulated_tiles;
  assert(tiles.configured);
  emulated_tile_zero(tile);
  for (int r = 0; r < tiles.rows[tile]; ++r) {
    std::memcpy(tiles.data[tile][r], static_cast<const uint8_t*>(base) + r * stride,
                tiles.row_bytes[tile]);
  }
}

inline void emulated_tile_stored(int tile, void* base, size_t stride) {
  const EmulatedTiles& tiles = emulated_tiles;
  assert(tiles.configured);
  for (int r = 0; r < tiles.rows[tile]; ++r) {
    std::memcpy(static_cast<uint8_t*>(base) + r * stride, tiles.data[tile][r],
                tiles.row_bytes[tile]);
  }
}

// C[m][n] += sum over k, i of A[m][4k + i] * B[k][4n + i], bytes of types A and B
template <class A, class B>
inline void emulated_tile_product(int c, int a, int b) {
  EmulatedTiles& tiles = emulated_tiles;
  assert(tiles.configured && tiles.row_bytes[a] / 4 == tiles.rows[b]);
  for (int m = 0; m < tiles.rows[c]; ++m) {
    for (int n = 0; n < tiles.row_bytes[c] / 4; ++n) {
      int32_t sum;
      std::memcpy(&sum, &tiles.data[c][m][4 * n], sizeof sum);
      for (int k = 0; k < tiles.rows[b]; ++k) {
        for (int i = 0; i < 4; ++i) {
          sum += static_cast<A>(tiles.data[a][m][4 * k + i]) *
                 static_cast<B>(tiles.data[b][k][4 * n + i]);
        }
      }
      std::memcpy(&tiles.data[c][m][4 * n], &sum, sizeof sum);
    }
  }
}

#define _tile_loadconfig emulated_tile_loadconfig
#define _tile_release emulated_tile_release
#define _tile_zero emulated_tile_zero
#define _tile_loadd emulated_tile_loadd
#define _tile_stored emulated_tile_stored
#define _tile_dpbusd emulated_tile_product<uint8_t, int8_t>
#define _tile_dpbssd emulated_tile_product<int8_t, int8_t>
#define _tile_dpbsud emulated_tile_product<int8_t, uint8_t>
