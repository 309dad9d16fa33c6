// AMX's layout of activations, and the transpose that both it and the results need.
//
// For more than kFewTokens tokens: sums of q [m], then for each 16 tokens, for each step (one plane
// of one 64-byte block of a packed row) one B tile of 1 KB: byte [r][4 * t + i] is token t's
// activation 4 * r + i of that step. Tokens are padded with zeros.
#pragma once

#include "kernels/avx512vnni/vectors.h"

namespace nomatmul {
namespace {

constexpr int kTile = 1024;  // bytes of a tile
constexpr int kSide = 16;    // rows of a tile; tokens of a C tile

// rows[i] lane j becomes rows[j] lane i.
NOMATMUL_INLINE inline void transpose(__m512i (&rows)[kSide]) {
  __m512i pairs[kSide], fours[kSide], eights[kSide];
  unrolled<8>([&](auto i) NOMATMUL_INLINE {
    pairs[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
    pairs[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
  });
  unrolled<4>([&](auto i) NOMATMUL_INLINE {  // fours[4 i + j]: columns j, j + 4, j + 8, j + 12
    fours[4 * i] = _mm512_unpacklo_epi64(pairs[4 * i], pairs[4 * i + 2]);
    fours[4 * i + 1] = _mm512_unpackhi_epi64(pairs[4 * i], pairs[4 * i + 2]);
    fours[4 * i + 2] = _mm512_unpacklo_epi64(pairs[4 * i + 1], pairs[4 * i + 3]);
    fours[4 * i + 3] = _mm512_unpackhi_epi64(pairs[4 * i + 1], pairs[4 * i + 3]);
  });
  unrolled<4>([&](auto j) NOMATMUL_INLINE {                              // of rows 0..7 and 8..15
    eights[j] = _mm512_shuffle_i32x4(fours[j], fours[j + 4], 0x88);      // columns j, j + 8
    eights[j + 4] = _mm512_shuffle_i32x4(fours[j], fours[j + 4], 0xdd);  // j + 4, j + 12
    eights[j + 8] = _mm512_shuffle_i32x4(fours[j + 8], fours[j + 12], 0x88);
    eights[j + 12] = _mm512_shuffle_i32x4(fours[j + 8], fours[j + 12], 0xdd);
  });
  unrolled<8>([&](auto j) NOMATMUL_INLINE {
    rows[j] = _mm512_shuffle_i32x4(eights[j], eights[j + 8], 0x88);
    rows[j + 8] = _mm512_shuffle_i32x4(eights[j], eights[j + 8], 0xdd);
  });
}

// Up to 16 tokens into B tiles, one block of packed bytes at a time.
template <int kPlanes>
void prepare_group(const int8_t* q, int tokens, int k, size_t ldq, const PlaneLayout& layout,
                   uint8_t* tiles) {
  constexpr int kBlock = kPlanes * kVec;
  alignas(64) int8_t planes[kSide][kBlock] = {};
  for (int b = 0; b < layout.blocks; ++b, tiles += kPlanes * kTile) {
    const int from = b * kBlock, there = at_most(kBlock, k - from);
    for (int t = 0; t < tokens; ++t) {
      split_row<kVec, kPlanes>(q + static_cast<size_t>(t) * ldq + from, there, planes[t]);
    }
    for (int p = 0; p < kPlanes; ++p) {
      __m512i rows[kSide];
      unrolled<kSide>([&](auto t) NOMATMUL_INLINE { rows[t] = load(planes[t] + p * kVec); });
      transpose(rows);
      unrolled<kSide>([&](auto r)
                          NOMATMUL_INLINE { store(tiles + p * kTile + r * kVec, rows[r]); });
    }
  }
}

}  // namespace
}  // namespace nomatmul
