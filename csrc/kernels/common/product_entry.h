// The products of a table of ternary kernels, from the parts that an instruction set has for them.
#pragma once

#include "kernels/common/gemm.h"

namespace nomatmul {
namespace {

// product() of the table, by T::product_of<packing>(operands).
template <class T>
struct ProductEntry {
  static void product(Packing packing, const TernaryProduct& wanted) {
    const Operands op(packing, T::kVec, wanted);
    if (packing == Packing::kTwoBit) {
      T::template product_of<Packing::kTwoBit>(op);
    } else {
      T::template product_of<Packing::kBase3>(op);
    }
  }
};

// Rows that are read together, vector by vector.
template <class Isa, int kRows>
struct RowPointers {
  const uint8_t* rows[kRows];
  size_t row_bytes;

  NOMATMUL_INLINE RowPointers(const Operands& op, Packing packing, int n, int count)
      : row_bytes(row_bytes_of(packing, op.k)) {
    op.rows_from(n, count, rows);
  }
  // body(load_row, block) for blocks first..last; only the row's last block may be half there.
  template <class Body>
  NOMATMUL_INLINE void blocks(int first, int last, Body&& body) const {
    const int whole = static_cast<int>(row_bytes / Isa::kVec);
    int b = first;
    for (; b < at_most(last, whole); ++b) {
      const size_t at = static_cast<size_t>(b) * Isa::kVec;
      const auto load_row = [&](auto r) NOMATMUL_INLINE {
        Isa::fetch_ahead(rows[r] + at);
        return Isa::load(rows[r] + at);
      };
      body(load_row, b);
    }
    if (b < last) {
      const size_t at = static_cast<size_t>(b) * Isa::kVec;
      const auto load_row = [&](auto r) NOMATMUL_INLINE {
        Isa::fetch_ahead(rows[r] + at);
        return Isa::load_packed(rows[r] + at, row_bytes - at);
      };
      body(load_row, b);
    }
  }
};

constexpr int kTileRows = 4;

// Codes stay in registers. Besides digits.h: Isa::fetch_ahead(p) prefetches behind a place in a
// row.
template <class Isa, Packing packing, int kTokens>
void few_tokens(const Operands& op) {
  constexpr int kPlanes = planes_of(packing);
  const size_t q_stride = op.layout.bytes_per_token;
  for (int n = op.n0; n < op.n1; n += kTileRows) {
    const int count = at_most(kTileRows, op.n1 - n);
    const RowPointers<Isa, kTileRows> rows(op, packing, n, count);
    typename Isa::Sum sums[kTokens][kTileRows];
    unrolled<kTokens>([&](auto t) NOMATMUL_INLINE {
      unrolled<kTileRows>([&](auto r) NOMATMUL_INLINE { sums[t][r] = typename Isa::Sum{}; });
    });
    rows.blocks(0, op.layout.blocks, [&](auto load_row, int b) NOMATMUL_INLINE {
      const int8_t* q = op.q + static_cast<size_t>(b) * kPlanes * Isa::kVec;
      Digits<Isa, packing> digits[kTileRows];
      unrolled<kTileRows>([&](auto r)
                              NOMATMUL_INLINE { digits[r] = Digits<Isa, packing>(load_row(r)); });
      unrolled<kPlanes>([&](auto p) NOMATMUL_INLINE {
        typename Isa::V codes[kTileRows];
        unrolled<kTileRows>([&](auto r) NOMATMUL_INLINE {
          codes[r] = digits[r].template next<decltype(p)::value>();
        });
        unrolled<kTokens>([&](auto t) NOMATMUL_INLINE {
          const typename Isa::V q_t =
              Isa::load(q + static_cast<size_t>(t) * q_stride + p * Isa::kVec);
          unrolled<kTileRows>([&](auto r)
                                  NOMATMUL_INLINE { Isa::add_product(sums[t][r], codes[r], q_t); });
        });
      });
    });
    unrolled<kTokens>([&](auto t) NOMATMUL_INLINE {
      int32_t folded[kTileRows];
      Isa::fold(sums[t], folded);
      op.write(t, n, folded, count);
    });
  }
}

// Isa::few<packing, tokens>(operands) for the operands' number of tokens, at most kFewTokens.
template <class Isa, Packing packing, int kTokens = Isa::kFewTokens>
void product_of_few(const Operands& op) {
  if constexpr (kTokens > 0) {
    if (op.m == kTokens) return Isa::template few<packing, kTokens>(op);
    product_of_few<Isa, packing, kTokens - 1>(op);
  }
}

// Activations in planes (plane.h): few tokens by product_of_few(), more by gemm.h.
template <class Isa>
struct PlaneProducts : ProductEntry<PlaneProducts<Isa>> {
  static constexpr int kVec = Isa::kVec;

  static size_t prepared_bytes(Packing packing, int m, int k) {
    const PlaneLayout layout(packing, kVec, m, k);
    return m <= Isa::kFewTokens ? layout.bytes(m) : Gemm<Isa>::prepared_bytes(layout, m);
  }
  static void prepare(Packing packing, const int8_t* q, int m, int k, int ldq, void* prepared) {
    if (m <= Isa::kFewTokens) return prepare_planes<kVec>(packing, q, m, k, ldq, prepared);
    const PlaneLayout layout(packing, kVec, m, k);
    auto* bytes = static_cast<uint8_t*>(prepared);
    if (packing == Packing::kTwoBit) {
      Gemm<Isa>::template prepare<4>(layout, q, m, k, static_cast<size_t>(ldq), bytes);
    } else {
      Gemm<Isa>::template prepare<5>(layout, q, m, k, static_cast<size_t>(ldq), bytes);
    }
  }
  static size_t scratch_bytes(Packing packing, int m, int) {
    return m <= Isa::kFewTokens ? 0 : Gemm<Isa>::scratch_bytes(packing, m);
  }
  template <Packing packing>
  static void product_of(const Operands& op) {
    if (op.m > Isa::kFewTokens) return Gemm<Isa>::template product<packing>(op);
    product_of_few<Isa, packing>(op);
  }
};

}  // namespace
}  // namespace nomatmul
