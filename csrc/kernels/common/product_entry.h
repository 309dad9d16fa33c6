// The table's product(): picks the packing. Written once, included by each <isa>.cc after its
// kVec and its product_of<packing>(operands, scratch), which it calls.
#pragma once

#include "kernels/common/gemm.h"

namespace nomatmul {
namespace {

void product(Packing packing, const uint8_t* w, size_t row_bytes, int n0, int n1,
             const void* prepared, int m, int k, const float* token_scale, void* out, size_t ldo,
             void* scratch) {
  const Operands op(packing, kVec, w, row_bytes, n0, n1, prepared, m, k, token_scale, out, ldo);
  if (packing == Packing::kTwoBit) {
    product_of<Packing::kTwoBit>(op, scratch);
  } else {
    product_of<Packing::kBase3>(op, scratch);
  }
}

}  // namespace
}  // namespace nomatmul
