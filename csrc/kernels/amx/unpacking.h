// Packed rows to AMX's A tiles, block by block, in parts that fit between tile products.
#pragma once

#include "kernels/amx/layout.h"

namespace nomatmul {
namespace {

constexpr int kPanel = 2 * kSide;  // rows of w unpacked at a time

// Packed 64-byte vectors in a k block. While A (32 rows) of one block is multiplied, that of the
// next is unpacked between its tiles: 2 x 16 KB (2 bits) or 2 x 20 KB (base 3) of 48 KB of L1.
constexpr int kBlock = 2;
constexpr int kMaxSteps = 5 * kBlock;

// The k blocks of all panels, in the order of the product.
struct Block {
  int n, first, count;  // its panel's first row; packed vectors before it, and in it

  static Block at(const Operands& op, int n, int first) {
    return {n, first, at_most(kBlock, op.layout.blocks - first)};
  }
  bool last(const Operands& op) const { return first + count == op.layout.blocks; }
  Block next(const Operands& op) const {
    return last(op) ? at(op, n + kPanel, 0) : at(op, n, first + count);
  }
};

// Codes of a block as A tiles [row half][step], made little by little. What comes after in each row
// is prefetched meanwhile: the panel's rows are too many streams for the hardware to follow.
template <Packing packing>
class Unpacking {
 public:
  Unpacking(const Operands& op, const Block& block, uint8_t* a)
      : count_(block.count),
        rows_(at_most(kPanel, op.n1 - block.n)),
        stride_(op.row_bytes),
        to_(a) {
    if (rows_ <= 0) {
      r_ = kPanel;
      return;
    }
    const size_t from = static_cast<size_t>(block.first) * kVec;
    w_ = op.row(block.n) + from;
    left_ = row_bytes_of(packing, op.k) - from;
    // behind the row's end: the same place of the row that follows this panel
    ahead_ = block.last(op) ? kPanel * stride_ - from : static_cast<size_t>(count_) * kVec;
  }

  // A part is one packed vector of one row.
  NOMATMUL_INLINE void some(int parts) {
    constexpr int kPlanes = planes_of(packing);
    for (; parts > 0 && r_ < kPanel; --parts) {
      const size_t at = static_cast<size_t>(b_) * kVec;
      fetch_ahead<0>(w_ + at + ahead_);
      Digits<Vectors, packing> digits(load_part(w_ + at, left_ - at));
      uint8_t* to = to_ + at * (kPlanes * kTile / kVec);
      unrolled<kPlanes>([&](auto p) NOMATMUL_INLINE {
        store(to + p * kTile, digits.template next<decltype(p)::value>());
      });
      if (++b_ == count_) next_row();
    }
  }
  NOMATMUL_INLINE void rest() { some(left()); }
  int left() const { return (kPanel - r_) * count_ - b_; }

 private:
  NOMATMUL_INLINE void next_row() {
    b_ = 0;
    if (++r_ < rows_) w_ += stride_;  // rows beyond n1 repeat the last; never written out
    to_ += r_ == kSide ? count_ * planes_of(packing) * kTile - (kSide - 1) * kVec : kVec;
  }

  const int count_, rows_;
  int r_ = 0, b_ = 0;  // of the next part: its row, and its vector
  const size_t stride_;
  size_t left_ = 0, ahead_ = 0;
  const uint8_t* w_ = nullptr;
  uint8_t* to_;
};

}  // namespace
}  // namespace nomatmul
