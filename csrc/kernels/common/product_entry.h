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
    return PlaneLayout(packing, kVec, m, k).bytes(m);
  }
  static void prepare(Packing packing, const int8_t* q, int m, int k, int ldq, void* prepared) {
    prepare_planes<kVec>(packing, q, m, k, ldq, prepared);
  }
  static size_t scratch_bytes(Packing packing, int m, int k) {
    return m <= Isa::kFewTokens ? 0 : Gemm<Isa>::scratch_bytes(packing, m, k);
  }
  template <Packing packing>
  static void product_of(const Operands& op) {
    if (op.m > Isa::kFewTokens) return Gemm<Isa>::template product<packing>(op);
    product_of_few<Isa, packing>(op);
  }
};

}  // namespace
}  // namespace nomatmul
