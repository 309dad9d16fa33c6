// AMX's layout of activations.
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
