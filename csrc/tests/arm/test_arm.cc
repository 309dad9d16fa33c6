// Every instruction set that runs here against the scalar one, without Python: random and awkward
// shapes, both packings, the float steps bit for bit. Written for NEON under qemu-user
// (test_arm.sh), but it does not care. Exits 1 with one line for the first difference.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "core/whole_attention.h"
#include "core/whole_product.h"
#include "kernels/isa.h"

namespace nomatmul {
void compare_trees(const Isa& isa, const Isa& scalar);   // test_arm_trees.cc
void compare_panels(const Isa& isa, const Isa& scalar);  // test_arm_panels.cc
}  // namespace nomatmul

namespace {

using nomatmul::Isa;
using nomatmul::KvForm;
using nomatmul::Packing;
using nomatmul::TernaryKernels;

std::mt19937 random_bits(7);

[[noreturn]] void fail(const Isa& isa, const std::string& what) {
  std::printf("%s differs from scalar: %s\n", isa.name, what.c_str());
  std::exit(1);
}

uint8_t random_byte(Packing packing) {
  if (packing == Packing::kBase3) {
    return static_cast<uint8_t>((random_bits() % 243 * 256 + 242) / 243);
  }
  unsigned byte = 0;
  for (int code = 0; code < 4; ++code) byte |= random_bits() % 3 << (2 * code);
  return static_cast<uint8_t>(byte);
}

struct Case {
  Packing packing;
  int m, k, n;
  std::vector<uint8_t> w;
  std::vector<int8_t> q;
  std::vector<float> scale;
};

Case random_case(Packing packing, int m, int k, int n) {
  Case c{packing, m, k, n, {}, {}, {}};
  c.w.resize(static_cast<size_t>(n) * nomatmul::row_bytes_of(packing, k));
  for (uint8_t& byte : c.w) byte = random_byte(packing);
  c.q.resize(static_cast<size_t>(m) * k);
  for (int8_t& value : c.q) value = static_cast<int8_t>(random_bits());
  c.scale.resize(m, 0.25f);
  return c;
}

// Rows 1.. of the product (all of them if there is one), the rest poisoned.
std::vector<int32_t> product(const TernaryKernels& kernels, const Case& c, bool scaled) {
  const size_t ldo = static_cast<size_t>(c.n) + 3;
  std::vector<int32_t> out(static_cast<size_t>(c.m) * ldo, 0x5eadbeef);
  nomatmul::whole_product(kernels, c.packing, c.q.data(),
                          {c.w.data(), nomatmul::row_bytes_of(c.packing, c.k), c.n > 1 ? 1 : 0, c.n,
                           c.m, c.k, scaled ? c.scale.data() : nullptr, out.data(), ldo});
  return out;
}

void compare_products(const Isa& isa, const Isa& other) {
  const TernaryKernels &kernels = *isa.ternary, &scalar = *other.ternary;
  const int tokens[] = {0, 1, 2, 3, 4, 5, 9, 16, 17, 33};
  const int columns[] = {1, 5, 63, 64, 65, 127, 129, 257, 640, 1281, 2600};
  for (Packing packing : {Packing::kTwoBit, Packing::kBase3}) {
    for (int m : tokens) {
      for (int k : columns) {
        for (int n : {0, 1, 15, 18}) {
          const Case c = random_case(packing, m, k, n);
          for (bool scaled : {false, true}) {
            if (product(kernels, c, scaled) != product(scalar, c, scaled)) {
              fail(isa, "product of packing " + std::to_string(static_cast<int>(packing)) + ", m " +
                            std::to_string(m) + ", k " + std::to_string(k) + ", n " +
                            std::to_string(n));
            }
          }
        }
      }
    }
    std::vector<uint8_t> bytes(5000);
    for (int byte = 0; byte < 256; ++byte) {
      for (uint8_t& one : bytes) one = random_byte(packing);
      bytes[random_bits() % bytes.size()] = static_cast<uint8_t>(byte);
      if (kernels.codes_ok(packing, bytes.data(), bytes.size()) !=
          scalar.codes_ok(packing, bytes.data(), bytes.size())) {
        fail(isa, "codes_ok with byte " + std::to_string(byte));
      }
    }
  }
}

// Equal bits; any NaN equals any NaN.
bool same(const std::vector<float>& a, const std::vector<float>& b) {
  for (size_t e = 0; e < a.size(); ++e) {
    if (std::isnan(a[e]) && std::isnan(b[e])) continue;
    if (std::memcmp(&a[e], &b[e], sizeof a[e]) != 0) return false;
  }
  return true;
}

// All float steps of one ISA, one after the other.
std::vector<std::vector<float>> float_steps(const TernaryKernels& k, const std::vector<float>& x,
                                            const std::vector<float>& y,
                                            const std::vector<float>& w) {
  const int d = static_cast<int>(x.size());
  std::vector<int8_t> q(x.size());
  std::vector<std::vector<float>> out(15, std::vector<float>(x.size()));
  const float step = k.rms_norm_quantize(x.data(), w.data(), 1e-6f, d, q.data());
  for (int e = 0; e < d; ++e) out[0][e] = std::isnan(step) ? step : step + q[e];
  k.rms_norm(x.data(), w.data(), 1e-6f, d, out[1].data());
  out[2] = out[3] = y;
  k.mlgru_step(x.data(), w.data(), nullptr, 1.0f, d, out[2].data());
  k.mlgru_step(y.data(), x.data(), w.data(), 0.0f, d, out[3].data());
  k.gate_norm(x.data(), y.data(), w.data(), 1e-5f, d, out[4].data());
  for (int kind = 0; kind < 4; ++kind) {
    k.gated(static_cast<nomatmul::Activation>(kind), x.data(), y.data(), d, out[8 + kind].data());
  }
  out[6] = x;
  k.add(out[6].data(), y.data(), d);
  k.normalise(x.data(), 1e-6f, d, out[7].data());
  for (int rounding = 0; rounding < 3; ++rounding) {
    const float found =
        k.scale_quantize(x.data(), nullptr, static_cast<nomatmul::Rounding>(rounding), d, q.data());
    for (int e = 0; e < d; ++e) {
      out[12 + rounding][e] = std::isnan(found) ? found : found + q[e];
    }
  }
  return out;
}

void compare_float_steps(const Isa& isa, const Isa& other) {
  const TernaryKernels &kernels = *isa.ternary, &scalar = *other.ternary;
  const float strange[] = {0.0f, -0.0f, 1e-42f, 88.0f, -88.1f, 1e30f, -1e30f, INFINITY, NAN};
  std::normal_distribution<float> normal(0.0f, 4.0f);
  for (int d : {1, 7, 8, 15, 16, 17, 31, 640, 2560}) {
    for (bool odd : {false, true}) {
      std::vector<float> x(d), y(d), w(d);
      for (int e = 0; e < d; ++e) {
        x[e] = odd && e % 3 == 0 ? strange[e % 9] : normal(random_bits);
        y[e] = odd && e % 5 == 0 ? strange[e % 9] : normal(random_bits);
        w[e] = normal(random_bits);
      }
      const auto ours = float_steps(kernels, x, y, w), theirs = float_steps(scalar, x, y, w);
      for (size_t step = 0; step < ours.size(); ++step) {
        if (!same(ours[step], theirs[step])) {
          fail(isa, "float step " + std::to_string(step) + ", d " + std::to_string(d));
        }
      }
    }
  }
}

void compare_attention(const Isa& isa, const Isa& scalar) {
  std::normal_distribution<float> normal(0.0f, 2.0f);
  const int shapes[][5] = {{1, 1, 1, 1, 64},  {1, 65, 4, 2, 96},  {3, 129, 5, 1, 128},
                           {1, 40, 8, 1, 80}, {1, 70, 2, 1, 256}, {17, 64, 6, 3, 20}};
  for (const auto& [tokens, positions, heads, kv_heads, e] : shapes) {
    std::vector<float> q(tokens * heads * e), k(positions * kv_heads * e), v(k.size());
    for (auto* values : {&q, &k, &v}) {
      for (float& value : *values) value = normal(random_bits);
    }
    v[0] = 6e-5f, v[1] = -2e-8f, v[2] = 65519.0f;
    for (KvForm form : {KvForm::kHalf, KvForm::kInt8, KvForm::kFloat}) {
      std::vector<float> ours(q.size()), theirs(q.size());
      for (auto [kernels, out] : {std::pair(isa.attention, &ours), {scalar.attention, &theirs}}) {
        whole_attention(*kernels, {heads, kv_heads, e, tokens, positions, form, 16, q.data(),
                                   k.data(), v.data(), out->data()});
      }
      if (!same(ours, theirs)) fail(isa, "attention of heads of " + std::to_string(e));
    }
  }
}

}  // namespace

// Arguments: instruction sets that must be there.
int main(int count, char** wanted) {
  for (int i = 1; i < count; ++i) {
    if (nomatmul::find_isa(wanted[i]) == nullptr) {
      std::printf("%s does not run here\n", wanted[i]);
      return 1;
    }
  }
  const Isa& scalar = *nomatmul::find_isa("scalar");
  for (const std::string& name : nomatmul::available_isas()) {
    const Isa& isa = *nomatmul::find_isa(name.c_str());
    compare_products(isa, scalar);
    compare_float_steps(isa, scalar);
    compare_attention(isa, scalar);
    nomatmul::compare_trees(isa, scalar);
    nomatmul::compare_panels(isa, scalar);
    std::printf("%s equals scalar\n", isa.name);
  }
  return 0;
}
