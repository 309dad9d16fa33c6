// The blocked product for several tokens, written once for the vector ISAs.
//
// A vector of codes holds four inputs of kVec / 4 rows, one 32-bit lane a row: rows are transposed
// in words of four packed bytes while they are unpacked. Against it stand four activations of a
// token, in every lane; so a sum's lanes are a token's results, and nothing is ever folded.
//
// Loops, from the outside: panel of rows > k block (the panel's codes, unpacked to a byte each,
// stay in L1) > tokens, a register tile at a time. Activations lie in the order of that reading:
// for each kTileTokens tokens (or fewer: width_of) and each step of four inputs, four bytes of each
// token. Sums over k blocks gather in a small int32 array [token][panel row] in scratch.
//
// Isa supplies the vectors of digits.h, and
//   kTileTokens         tokens of a register tile, or fewer
//   kPanelVectors       vectors of codes of a register tile
//   kRun                steps that a Sum holds
//   block_of(packing)   packed vectors in a k block
//   passes(packing)     register tiles up to which codes are not stored, but taken apart in each
//   transpose(rows)     kVec / 4 vectors of 32-bit lanes
//   fetch_line(p)       prefetches what will be unpacked next
//   four(p)             four bytes in each 32-bit lane
//   add_lanes(c, sum)   c[i] += the sum's lane i
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

template <class Isa>
struct Gemm {
  using V = typename Isa::V;
  static constexpr int kLanes = Isa::kVec / 4;
  static constexpr int kVectors = Isa::kPanelVectors, kPanel = kLanes * kVectors;

  // Tokens of a tile: 16 of them in tiles of at most 12 are 8 + 8, not 12 + 4.
  static int width_of(int m) {
    const int tiles = (m + Isa::kTileTokens - 1) / Isa::kTileTokens;
    return (m + tiles - 1) / tiles;
  }

  static size_t prepared_bytes(const PlaneLayout& layout, int m) {
    const size_t width = static_cast<size_t>(width_of(m));
    return layout.sums_bytes + round_up(static_cast<size_t>(m), width) * layout.bytes_per_token;
  }

  template <int kPlanes>
  static void prepare(const PlaneLayout& layout, const int8_t* q, int m, int k, size_t ldq,
                      uint8_t* prepared) {
    const int width = width_of(m);
    for (int t = 0; t < m; ++t) {
      const int8_t* q_t = q + static_cast<size_t>(t) * ldq;
      const int32_t sum = sum_of(q_t, k);
      std::memcpy(prepared + static_cast<size_t>(t) * sizeof sum, &sum, sizeof sum);
      uint8_t* to = prepared + layout.sums_bytes + 4 * static_cast<size_t>(t % width) +
                    static_cast<size_t>(t - t % width) * layout.bytes_per_token;
      spread_row<Isa::kVec, kPlanes>(q_t, k, to, 4 * static_cast<size_t>(width));
    }
  }

  static size_t codes_bytes(Packing packing) {
    return static_cast<size_t>(kPanel) * Isa::block_of(packing) * planes_of(packing) * Isa::kVec;
  }
  static size_t scratch_bytes(Packing packing, int m) {
    return codes_bytes(packing) + static_cast<size_t>(m) * kPanel * sizeof(int32_t);
  }

  // fn(integral constant) for a number of tokens, at most kTileTokens.
  template <int kTokens = Isa::kTileTokens, class F>
  NOMATMUL_INLINE static void with_tokens(int tokens, F&& fn) {
    if constexpr (kTokens >= 1) {
      if (tokens == kTokens) return fn(std::integral_constant<int, kTokens>{});
      with_tokens<kTokens - 1>(tokens, fn);
    }
  }

  template <int kTokens>
  struct Tile {
    typename Isa::Sum sums[kTokens][kVectors];

    NOMATMUL_INLINE void start() {
      unrolled<kTokens>([&](auto t) NOMATMUL_INLINE {
        unrolled<kVectors>([&](auto v) NOMATMUL_INLINE { sums[t][v] = typename Isa::Sum{}; });
      });
    }
    NOMATMUL_INLINE void step(const V (&code)[kVectors], const uint8_t* q) {
      unrolled<kTokens>([&](auto t) NOMATMUL_INLINE {
        const V q_t = Isa::four(q + 4 * t);
        unrolled<kVectors>([&](auto v)
                               NOMATMUL_INLINE { Isa::add_product(sums[t][v], code[v], q_t); });
      });
    }
    NOMATMUL_INLINE void add_to(int32_t* c) const {
      unrolled<kTokens>([&](auto t) NOMATMUL_INLINE {
        unrolled<kVectors>([&](auto v) NOMATMUL_INLINE {
          Isa::add_lanes(c + t * kPanel + v * kLanes, sums[t][v]);
        });
      });
    }
  };

  // c[t * kPanel + r] += sum of code * q. Not inlined, here and below: a loop begins where the
  // function's alignment puts it, whatever stands around the call.
  template <int kTokens>
  __attribute__((noinline)) static void codes_tile(const uint8_t* codes, const uint8_t* q,
                                                   size_t q_step, int steps, int32_t* c) {
    Tile<kTokens> tile;
    tile.start();
    for (int step = 0; step < steps; ++step, codes += kVectors * Isa::kVec, q += q_step) {
      V code[kVectors];
      unrolled<kVectors>([&](auto v) NOMATMUL_INLINE {
        code[v] = Isa::load(codes + v * Isa::kVec);
        Isa::tie(code[v]);
      });
      tile.step(code, q);
    }
    tile.add_to(c);
  }

  // The same, of words that are taken apart here.
  template <Packing packing, int kTokens>
  __attribute__((noinline)) static void words_tile(const uint8_t* words, const uint8_t* q,
                                                   size_t q_step, int count, int32_t* c) {
    constexpr int kPlanes = planes_of(packing);
    const size_t plane = kLanes * q_step;
    Tile<kTokens> tile;
    tile.start();
    for (int vector = 0; vector < count; ++vector, q += (kPlanes - 1) * plane) {
      for (int word = 0; word < kLanes; ++word, words += kVectors * Isa::kVec, q += q_step) {
        Digits<Isa, packing> digits[kVectors];
        unrolled<kVectors>([&](auto v) NOMATMUL_INLINE {
          digits[v] = Digits<Isa, packing>(Isa::load(words + v * Isa::kVec));
        });
        unrolled<kPlanes>([&](auto p) NOMATMUL_INLINE {
          V code[kVectors];
          unrolled<kVectors>([&](auto v) NOMATMUL_INLINE {
            code[v] = digits[v].template next<decltype(p)::value>();
            Isa::tie(code[v]);
          });
          tile.step(code, q + p * plane);
        });
      }
    }
    tile.add_to(c);
  }

  // All tokens of a k block.
  template <Packing packing>
  static void multiply(const Operands& op, size_t before, int count, const uint8_t* codes,
                       int32_t* c) {
    constexpr int kPlanes = planes_of(packing);
    const int width = width_of(op.m);
    const size_t q_step = 4 * static_cast<size_t>(width);
    for (int t = 0; t < op.m; t += width, c += width * kPanel) {
      const auto* q = reinterpret_cast<const uint8_t*>(op.token(t)) + before * kPlanes * width;
      with_tokens(at_most(width, op.m - t), [&](auto tokens) {
        if constexpr (Isa::passes(packing) > 0) {
          if (keeps_words<packing>(op.m)) {
            return words_tile<packing, tokens>(codes, q, q_step, count, c);
          }
        }
        const int steps = count * kPlanes * kLanes;
        for (int step = 0; step < steps; step += Isa::kRun) {
          codes_tile<tokens>(codes + static_cast<size_t>(step) * kVectors * Isa::kVec,
                             q + static_cast<size_t>(step) * q_step, q_step,
                             at_most(steps - step, Isa::kRun), c);
        }
      });
    }
  }

  template <Packing packing>
  static bool keeps_words(int m) {
    return m <= Isa::passes(packing) * Isa::kTileTokens;
  }

  // Where a panel's rows are, and how far it is to those of the next one.
  struct Rows {
    const uint8_t* at[kPanel];  // beyond n1 the last one again; never written out
    size_t bytes, to_next;
  };

  // `count` packed vectors from byte `from` on of each row, to [vector, plane, word][kVectors]
  // vectors of codes, or without kCodes to [vector, word][kVectors] vectors of
  // packed bytes. What comes after in each row is prefetched meanwhile: the rows are too many
  // streams for the hardware to follow.
  template <Packing packing, bool kCodes>
  static void unpack(const Rows& rows, size_t from, int count, uint8_t* codes) {
    constexpr int kPlanes = planes_of(packing);
    const size_t end = from + static_cast<size_t>(count) * Isa::kVec;
    for (size_t at = from; at < end; at += Isa::kVec) {
      const size_t later = at + end - from;
      const size_t next = later < rows.bytes ? later : at - from + rows.to_next;
      for (int v = 0; v < kVectors; ++v) {
        V words[kLanes];
        unrolled<kLanes>([&](auto r) NOMATMUL_INLINE {
          const uint8_t* row = rows.at[v * kLanes + r];
          Isa::fetch_line(row + next);
          words[r] = Isa::load_packed(row + at, rows.bytes - at);
        });
        Isa::transpose(words);
        uint8_t* to = codes + v * Isa::kVec;
        if (!kCodes) {
          unrolled<kLanes>([&](auto word) NOMATMUL_INLINE {
            Isa::store(to + word * kVectors * Isa::kVec, words[word]);
          });
          continue;
        }
        unrolled<kLanes>([&](auto word) NOMATMUL_INLINE {
          Digits<Isa, packing> digits(words[word]);
          unrolled<kPlanes>([&](auto p) NOMATMUL_INLINE {
            Isa::store(to + (p * kLanes + word) * kVectors * Isa::kVec,
                       digits.template next<decltype(p)::value>());
          });
        });
      }
      codes += static_cast<size_t>(kCodes ? kPlanes : 1) * kPanel * Isa::kVec;
    }
  }

  template <Packing packing>
  static void panel(const Operands& op, int n, uint8_t* codes, int32_t* c) {
    const int count = at_most(kPanel, op.n1 - n);
    Rows rows;
    op.rows_from(n, count, rows.at);
    rows.bytes = row_bytes_of(packing, op.k);
    rows.to_next = kPanel * op.row_bytes;
    std::memset(c, 0, static_cast<size_t>(op.m) * kPanel * sizeof(int32_t));
    each_k_block(op.layout.blocks, Isa::block_of(packing), [&](int first, int vectors) {
      const size_t from = static_cast<size_t>(first) * Isa::kVec;
      if (keeps_words<packing>(op.m)) {
        unpack<packing, false>(rows, from, vectors, codes);
      } else {
        unpack<packing, true>(rows, from, vectors, codes);
      }
      multiply<packing>(op, from, vectors, codes, c);
    });
    for (int t = 0; t < op.m; ++t) op.write(t, n, c + static_cast<size_t>(t) * kPanel, count);
  }

  template <Packing packing>
  static void product(const Operands& op) {
    auto* codes = static_cast<uint8_t*>(op.scratch);
    auto* c = reinterpret_cast<int32_t*>(codes + codes_bytes(packing));
    for (int n = op.n0; n < op.n1; n += kPanel) panel<packing>(op, n, codes, c);
  }
};

}  // namespace
}  // namespace nomatmul
