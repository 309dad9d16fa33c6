// The weights of a linear in panels (kernels/panels.h), re-arranged from the rows of a packed file.
#pragma once

#include "core/memory.h"
#include "kernels/isa.h"

namespace nomatmul {

class PanelWeights {
 public:
  PanelWeights() = default;
  // `rows` rows in `halves` halves: the second one begins with a panel of its own. room: zeroed
  // bytes() for them, which somebody else keeps, or nullptr: they get a block of their own.
  PanelWeights(const PanelShape& shape, int int8_bias, int rows, int halves,
               uint8_t* room = nullptr);
  static size_t bytes(const PanelShape& shape, int rows, int halves) {
    return static_cast<size_t>((rows / halves + kPanelRows - 1) / kPanelRows) * halves *
           shape.bytes();
  }

  // Each takes all rows. They touch different bytes: two threads may fill a matrix's codes and
  // scales at the same time.
  void fill_codes(Packing packing, const uint8_t* rows);  // packed rows, one behind the other
  void fill_int8(const int8_t* rows);                     // [rows, k]
  void fill_scales(const void* scales);                   // [rows, groups] of the shape's type

  const PanelShape& shape() const { return shape_; }
  // The panel that holds a row; where a tile begins, its first one.
  const uint8_t* panel_of(int row) const {
    return room_ +
           static_cast<size_t>(row / half_ * panels_ + row % half_ / kPanelRows) * shape_.bytes();
  }
  // Weights [k] of a row: value * scale.
  void values(int row, float* to) const;

 private:
  uint8_t* codes_of(int row) const;  // the row's lane of the first vector
  float scale_of(int row, int group) const;

  PanelShape shape_{};
  int bias_ = 0, rows_ = 0, half_ = 1, panels_ = 0;  // of a half
  Block block_;
  uint8_t* room_ = nullptr;
};

}  // namespace nomatmul
