// Exact products of float rows (kernels/panels.h), written once over the vectors of
// common/panels.h. Besides those an instruction set has load_bfloats(p), 16 of them, and
// kFloatRows.
#pragma once

#include "kernels/common/panels.h"

namespace nomatmul {
namespace {

// Floats of a column of 16 inputs from p on.
template <class Isa, FloatForm form>
NOMATMUL_INLINE inline typename Isa::Floats load_row(const uint8_t* p, int column) {
  constexpr int kLanes = kLanesOf(Isa::kVectors);
  if constexpr (form == FloatForm::kF32) {
    return Isa::load_floats(reinterpret_cast<const float*>(p) + column * kLanes);
  } else if constexpr (form == FloatForm::kBF16) {
    return Isa::load_bfloats(p + 2 * column * kLanes);
  } else {
    return Isa::load_halves(p + 2 * column * kLanes);
  }
}

template <class Isa, FloatForm form, int kRows>
void float_rows(const FloatProduct& p, int n, int t) {
  constexpr size_t kBytes = form == FloatForm::kF32 ? 4 : 2;
  constexpr int kVectors = Isa::kVectors, kLanes = kLanesOf(kVectors);
  const uint8_t* w = static_cast<const uint8_t*>(p.w) + static_cast<size_t>(n) * p.k * kBytes;
  const float* x = p.x + static_cast<size_t>(t) * p.k;
  typename Isa::Floats lanes[kRows][kVectors];
  unrolled<kRows>([&](auto r) NOMATMUL_INLINE {
    unrolled<kVectors>([&](auto c) NOMATMUL_INLINE { lanes[r][c] = Isa::zero(); });
  });
  const auto add = [&](const float* values, auto row) NOMATMUL_INLINE {
    unrolled<kVectors>([&](auto c) NOMATMUL_INLINE {
      const auto value = Isa::load_floats(values + c * kLanes);
      unrolled<kRows>([&](auto r) NOMATMUL_INLINE {
        lanes[r][c] = Isa::fma(value, load_row<Isa, form>(row(r), c), lanes[r][c]);
      });
    });
  };
  int i = 0;
  for (; i + 16 <= p.k; i += 16) {
    add(x + i,
        [&](int r) NOMATMUL_INLINE { return w + (static_cast<size_t>(r) * p.k + i) * kBytes; });
  }
  if (i < p.k) {  // what is not there adds zeros
    float values[16] = {};
    uint8_t rows[kRows][64] = {};
    std::memcpy(values, x + i, (p.k - i) * sizeof(float));
    for (int r = 0; r < kRows; ++r) {
      std::memcpy(rows[r], w + (static_cast<size_t>(r) * p.k + i) * kBytes, (p.k - i) * kBytes);
    }
    add(values, [&](int r) NOMATMUL_INLINE -> const uint8_t* { return rows[r]; });
  }
  for (int r = 0; r < kRows; ++r) {
    float lane[16];
    for (int c = 0; c < kVectors; ++c) Isa::store_floats(lane + c * kLanes, lanes[r][c]);
    for (int half = 8; half > 0; half /= 2) {
      for (int j = 0; j < half; ++j) lane[j] += lane[j + half];
    }
    p.out[t * p.ldo + n + r] = lane[0];
  }
}

template <class Isa, FloatForm form>
void float_product_as(const FloatProduct& p) {
  constexpr int kRows = Isa::kFloatRows;
  int n = 0;
  for (; n + kRows <= p.rows; n += kRows) {
    for (int t = 0; t < p.m; ++t) float_rows<Isa, form, kRows>(p, n, t);
  }
  for (; n < p.rows; ++n) {
    for (int t = 0; t < p.m; ++t) float_rows<Isa, form, 1>(p, n, t);
  }
}

template <class Isa>
void float_product(const FloatProduct& p) {
  switch (p.form) {
    case FloatForm::kF32:
      return float_product_as<Isa, FloatForm::kF32>(p);
    case FloatForm::kBF16:
      return float_product_as<Isa, FloatForm::kBF16>(p);
    case FloatForm::kF16:
      return float_product_as<Isa, FloatForm::kF16>(p);
  }
}

}  // namespace
}  // namespace nomatmul
