// The blocked product for several tokens, written once for the vector ISAs.
//
// Loops, from the outside: token block (its activations stay in L2) > panel of rows > k block
// (the panel's codes, unpacked to a byte each, stay in L1) > tokens > rows of the register tile.
// Sums over k blocks gather in a small int32 array [token][panel row] in scratch.
//
// Isa supplies the vectors of digits.h, and
//   kTileTokens         tokens of a register tile of kTileRows rows, or fewer
//   kPanel              rows unpacked at a time, a multiple of kTileRows
//   kMaxBlockSteps      steps of a k block at most
//   block_of(packing)   packed vectors in a k block
//   kTokenBlockBytes
#pragma once

#include "kernels/common/digits.h"
#include "kernels/common/plane.h"

namespace nomatmul {
namespace {

// Calls body(packed vectors before this block, packed vectors in it) for blocks of nearly equal
// length: a short last one would pay its reduction for little work.
template <class Body>
inline void each_k_block(int blocks, int longest, Body&& body) {
  const int pieces = (blocks + longest - 1) / longest;
  for (int piece = 0, first = 0; piece < pieces; ++piece) {
    const int count = (blocks - first) / (pieces - piece);
    body(first, count);
    first += count;
  }
}

constexpr int kTileRows = 4;

template <class Isa>
struct Gemm {
  using V = typename Isa::V;
  static constexpr int kMaxBlock = Isa::kMaxBlockSteps * Isa::kVec;  // codes of a row and k block
  static constexpr int kTokenBlockBytes = Isa::kTokenBlockBytes;

  static int token_block(const PlaneLayout& layout, int m) {
    const int fit = static_cast<int>(kTokenBlockBytes / layout.bytes_per_token);
    const int whole = fit / Isa::kTileTokens * Isa::kTileTokens;
    const int least = 8 * Isa::kTileTokens;  // below this, unpacking costs more than the misses
    return at_most(m, whole > least ? whole : least);
  }

  static size_t scratch_bytes(Packing packing, int m, int k) {
    const PlaneLayout layout(packing, Isa::kVec, m, k);
    return static_cast<size_t>(Isa::kPanel) * kMaxBlock +
           static_cast<size_t>(token_block(layout, m)) * Isa::kPanel * sizeof(int32_t);
  }

  // All tokens of one k block, a tile at a time.
  static void multiply(const uint8_t* codes, size_t code_stride, const int8_t* q, size_t q_stride,
                       int tokens, int rows, int steps, int32_t* c) {
    int t = 0;
    while (t < tokens) {
      const int width = next_width(tokens - t);
      for (int r = 0; r < rows; r += kTileRows) {
        tile_of(width, codes + static_cast<size_t>(r) * code_stride, code_stride,
                q + static_cast<size_t>(t) * q_stride, q_stride, steps, c + t * Isa::kPanel + r);
      }
      t += width;
    }
  }

  // Spreads what is left evenly: 16 tokens in tiles of at most 6 are 6 + 5 + 5, not 6 + 6 + 4.
  static int next_width(int left) {
    const int tiles = (left + Isa::kTileTokens - 1) / Isa::kTileTokens;
    return (left + tiles - 1) / tiles;
  }

  template <int kTokens = Isa::kTileTokens>
  static void tile_of(int width, const uint8_t* codes, size_t code_stride, const int8_t* q,
                      size_t q_stride, int steps, int32_t* c) {
    if constexpr (kTokens >= 1) {
      if (width == kTokens) {
        tile<kTokens>(codes, code_stride, q, q_stride, steps, c);
      } else {
        tile_of<kTokens - 1>(width, codes, code_stride, q, q_stride, steps, c);
      }
    }
  }

  // c[t * kPanel + r] += sum of code * q. Not inlined: its loop begins where the function's
  // alignment puts it, whatever stands around the call.
  template <int kTokens>
  __attribute__((noinline)) static void tile(const uint8_t* codes, size_t code_stride,
                                             const int8_t* q, size_t q_stride, int steps,
                                             int32_t* c) {
    typename Isa::Sum sums[kTokens][kTileRows];
    unrolled<kTokens>([&](auto t) NOMATMUL_INLINE {
      unrolled<kTileRows>([&](auto r) NOMATMUL_INLINE { sums[t][r] = typename Isa::Sum{}; });
    });
    for (int step = 0; step < steps; ++step, codes += Isa::kVec, q += Isa::kVec) {
      V code[kTileRows];
      unrolled<kTileRows>([&](auto r) NOMATMUL_INLINE {
        code[r] = Isa::load(codes + static_cast<size_t>(r) * code_stride);
        Isa::tie(code[r]);
      });
      unrolled<kTokens>([&](auto t) NOMATMUL_INLINE {
        const V q_t = Isa::load(q + static_cast<size_t>(t) * q_stride);
        unrolled<kTileRows>([&](auto r)
                                NOMATMUL_INLINE { Isa::add_product(sums[t][r], code[r], q_t); });
      });
    }
    unrolled<kTokens>([&](auto t) NOMATMUL_INLINE {
      int32_t folded[kTileRows];
      Isa::fold(sums[t], folded);
      unrolled<kTileRows>([&](auto r) NOMATMUL_INLINE { c[t * Isa::kPanel + r] += folded[r]; });
    });
  }

  // `bytes` packed bytes to planes of codes.
  template <Packing packing>
  static void unpack(const uint8_t* w, size_t bytes, uint8_t* codes) {
    constexpr int kPlanes = planes_of(packing);
    for (size_t at = 0; at < bytes; at += Isa::kVec, codes += kPlanes * Isa::kVec) {
      Digits<Isa, packing> digits(Isa::load_packed(w + at, bytes - at));
      unrolled<kPlanes>([&](auto p) NOMATMUL_INLINE {
        Isa::store(codes + p * Isa::kVec, digits.template next<decltype(p)::value>());
      });
    }
  }

  template <Packing packing>
  static void panel(const Operands& op, int n, int t0, int tokens, uint8_t* codes, int32_t* c) {
    constexpr int kPlanes = planes_of(packing);
    const int rows = at_most(Isa::kPanel, op.n1 - n);
    const int tiled_rows = static_cast<int>(round_up(static_cast<size_t>(rows), kTileRows));
    std::memset(c, 0, static_cast<size_t>(tokens) * Isa::kPanel * sizeof(int32_t));
    const size_t row_bytes = row_bytes_of(packing, op.k);
    each_k_block(op.layout.blocks, Isa::block_of(packing), [&](int first, int count) {
      const size_t from = static_cast<size_t>(first) * Isa::kVec;
      const size_t left = row_bytes - from, full = static_cast<size_t>(count) * Isa::kVec;
      const size_t code_stride = full * kPlanes;
      for (int r = 0; r < tiled_rows; ++r) {  // rows beyond n1 repeat the last; never written out
        unpack<packing>(op.row(n + at_most(r, rows - 1)) + from, left < full ? left : full,
                        codes + static_cast<size_t>(r) * code_stride);
      }
      multiply(codes, code_stride, op.token(t0) + from * kPlanes, op.layout.bytes_per_token, tokens,
               tiled_rows, count * kPlanes, c);
    });
    for (int t = 0; t < tokens; ++t) op.write(t0 + t, n, c + t * Isa::kPanel, rows);
  }

  template <Packing packing>
  static void product(const Operands& op) {
    auto* codes = static_cast<uint8_t*>(op.scratch);
    auto* c = reinterpret_cast<int32_t*>(codes + static_cast<size_t>(Isa::kPanel) * kMaxBlock);
    const int tokens = token_block(op.layout, op.m);
    for (int t0 = 0; t0 < op.m; t0 += tokens) {
      for (int n = op.n0; n < op.n1; n += Isa::kPanel) {
        panel<packing>(op, n, t0, at_most(tokens, op.m - t0), codes, c);
      }
    }
  }
};

}  // namespace
}  // namespace nomatmul
