// Packed bytes taken apart, over the vectors of an instruction set. Isa supplies
//   kVec, V, Sum                bytes of a vector; a vector of bytes; one of sums
//   load(p), store(p, v), tie(v)
//   load_packed(p, left)        `left` bytes of a row are left; those behind them read as 0
//   two_bit<plane>(packed), base3<plane>(packed)      codes of a plane, asked for in order; both
//   may
//                               change what they are taken from
//   add_product(sum, codes, q)
//   fold(sums, out)             the lane sums of four
#pragma once

#include "kernels/common/unroll.h"
#include "kernels/ternary.h"

namespace nomatmul {
namespace {

template <class Isa, Packing packing>
class Digits {
 public:
  Digits() = default;
  NOMATMUL_INLINE explicit Digits(typename Isa::V packed) : left_(packed) {}
  template <int kPlane>
  NOMATMUL_INLINE typename Isa::V next() {
    if constexpr (packing == Packing::kTwoBit) {
      return Isa::template two_bit<kPlane>(left_);
    } else {
      return Isa::template base3<kPlane>(left_);
    }
  }

 private:
  typename Isa::V left_;
};

}  // namespace
}  // namespace nomatmul
