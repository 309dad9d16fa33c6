// Panels and float rows of every instruction set that runs here against the scalar ones, bit for
// bit; see test_arm.cc.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "core/linears/whole_panels.h"

namespace nomatmul {
namespace {

std::vector<float> product(const Isa& isa, const PanelShape& shape, int n, int m) {
  std::mt19937 bits(static_cast<unsigned>(shape.k + 31 * n + 7 * m));
  const size_t row =
      shape.form == PanelForm::kInt8 ? shape.k : row_bytes_of(Packing::kTwoBit, shape.k);
  std::vector<uint8_t> rows(n * row);
  for (uint8_t& byte : rows) {
    byte = static_cast<uint8_t>(bits());
    if (shape.form == PanelForm::kTernary) byte &= 0x55 << (bits() & 1);  // no code 3
  }
  PanelWeights weights(shape, isa.panels->int8_bias, n, 1);
  if (shape.form == PanelForm::kInt8) {
    weights.fill_int8(reinterpret_cast<const int8_t*>(rows.data()));
  } else {
    weights.fill_codes(Packing::kTwoBit, rows.data());
  }
  std::vector<float> scales(static_cast<size_t>(n) * shape.groups());
  for (float& scale : scales) scale = 1e-3f * static_cast<float>(bits() % 1000);
  std::vector<uint16_t> halves(scales.size());
  for (uint16_t& half : halves) half = static_cast<uint16_t>(bits() % 0x7c00);
  weights.fill_scales(shape.half_scales ? static_cast<const void*>(halves.data()) : scales.data());
  std::vector<int8_t> q(static_cast<size_t>(m) * shape.k);
  for (int8_t& value : q) value = static_cast<int8_t>(static_cast<int>(bits() % 255) - 127);
  std::vector<float> step(static_cast<size_t>(m) * shape.groups());
  for (float& value : step) value = 1e-4f * static_cast<float>(bits() % 1000);
  std::vector<float> out(static_cast<size_t>(m) * n);
  whole_panels(*isa.panels, weights, n, q.data(), step.data(), m, out.data());
  return out;
}

std::vector<float> floats(const Isa& isa, FloatForm form, int n, int m, int k) {
  std::mt19937 bits(11);
  std::vector<float> x(static_cast<size_t>(m) * k), out(static_cast<size_t>(m) * n);
  for (float& value : x) value = static_cast<float>(static_cast<int>(bits() % 2001) - 1000) / 7;
  std::vector<float> w(static_cast<size_t>(n) * k);
  std::vector<uint16_t> halves(w.size());
  for (float& value : w) value = static_cast<float>(static_cast<int>(bits() % 2001) - 1000) / 3;
  for (uint16_t& half : halves) half = static_cast<uint16_t>(bits() % 0x7c00);
  const void* rows = form == FloatForm::kF32 ? static_cast<const void*>(w.data()) : halves.data();
  isa.panels->float_product({form, rows, n, m, k, x.data(), out.data(), static_cast<size_t>(n)});
  return out;
}

void same(const Isa& isa, const char* what, const std::vector<float>& a,
          const std::vector<float>& b) {
  if (std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0) return;
  std::printf("%s differs from scalar: %s\n", isa.name, what);
  std::exit(1);
}

}  // namespace

void compare_panels(const Isa& isa, const Isa& scalar) {
  for (int m : {1, 2, 3, 4, 5, 17, 40}) {
    for (int n : {1, 16, 37}) {
      for (int group : {32, 64, 128, 256}) {
        for (PanelForm form : {PanelForm::kTernary, PanelForm::kInt8}) {
          const PanelShape shape{form, 3 * group, group, m % 2 == 0};
          same(isa, "panels", product(isa, shape, n, m), product(scalar, shape, n, m));
        }
      }
      const PanelShape rows{PanelForm::kInt8, 101, 101, false};
      same(isa, "panels of whole rows", product(isa, rows, n, m), product(scalar, rows, n, m));
    }
  }
  for (FloatForm form : {FloatForm::kF32, FloatForm::kBF16, FloatForm::kF16}) {
    same(isa, "float rows", floats(isa, form, 9, 3, 75), floats(scalar, form, 9, 3, 75));
  }
}

}  // namespace nomatmul
