// Products of panels (kernels/panels.h), written once over vectors of 16, 8 or 4 of a panel's rows:
// a panel is Isa::kVectors of them, each a column of a register tile. An instruction set is a
// struct of
//   Bytes    4 bytes a row;   load(p), splat4(p) (the same 4 in every row), store(p, Bytes)
//   Ints, Floats              none() of zeros, floats_of(Ints), less(Ints, int32), plus(Ints,
//   Ints),
//                             fourth(Ints)
//   three<kLow>(Bytes)        codes at bits 0 (kLow) or, 4 times too large, 2 of each byte
//   lower<kBits>(Bytes)       each byte's bits from kBits on at 0.., whatever stands above
//   Ternary, Int8             {Sum, start(), add(Sum&, Bytes weights, Bytes q), total(Sum) -> Ints}
//   kRun     vectors of two bits whose products one Ternary::Sum may take
//   kPanels, kTokens          sums of so many panels and tokens stay in registers
//   zero(), splat(float), times(a, b), fma(a, b, c), load_floats(p), store_floats(p, Floats),
//   load_halves(p), fetch_ahead(p), kInt8Bias
#pragma once

#include "kernels/common/panels_of_few.h"
#include "kernels/common/panels_of_many.h"

namespace nomatmul {
namespace {

template <class Isa, PanelForm form>
void panels_product(const PanelShape& s, const PanelProduct& p) {
  if (p.width < kPanelTile) {
    unrolled<kPanelFewTokens>([&](auto i) {
      if (p.m == i + 1) panels_of_few<Isa, form, i + 1>(s, p);
    });
    return;
  }
  int n = 0;
  for (; n + (Isa::kPanels - 1) * kPanelRows < p.rows; n += Isa::kPanels * kPanelRows) {
    panels_of_many<Isa, form, Isa::kPanels>(s, p, n);
  }
  for (; n < p.rows; n += kPanelRows) panels_of_many<Isa, form, 1>(s, p, n);
}

template <class Isa>
struct Panels {
  static size_t scratch_bytes(const PanelShape& s, int m) {
    if (m <= kPanelFewTokens) return 0;
    const bool codes = s.form == PanelForm::kTernary;
    const size_t open = codes ? static_cast<size_t>(groups_at_once(s)) * s.stored() : 0;
    const size_t tokens = (static_cast<size_t>(m) + kPanelTile - 1) / kPanelTile * kPanelTile;
    return Isa::kPanels * kPanelRows * (open + tokens * sizeof(float));
  }
  static void product(const PanelShape& s, const PanelProduct& p) {
    if (s.form == PanelForm::kTernary) return panels_product<Isa, PanelForm::kTernary>(s, p);
    panels_product<Isa, PanelForm::kInt8>(s, p);
  }
};

}  // namespace
}  // namespace nomatmul
