// Causal attention on any CPU: the C library's fma, and float16 in software.
#include <cmath>

#include "kernels/common/attention_ops.h"
#include "kernels/common/half.h"

namespace nomatmul {
namespace {

struct Scalar {
  struct W {
    float v[16];
  };
  static constexpr int kTile = 1;

  template <class F>
  static W each(F value) {
    W w;
    for (int i = 0; i < 16; ++i) w.v[i] = value(i);
    return w;
  }
  static W zero() {
    return each([](int) { return 0.0f; });
  }
  static W load(const float* p) {
    return each([=](int i) { return p[i]; });
  }
  static void store(float* p, const W& w) { std::memcpy(p, w.v, sizeof w.v); }
  static W broadcast(float x) {
    return each([=](int) { return x; });
  }
  static W multiply(const W& a, const W& b) {
    return each([&](int i) { return a.v[i] * b.v[i]; });
  }
  static W fma(const W& a, const W& b, const W& c) {
    return each([&](int i) { return std::fma(a.v[i], b.v[i], c.v[i]); });
  }
  static W halves(const uint16_t* p) {
    return each([=](int i) { return float_of_half(p[i]); });
  }
  static W bytes(const int8_t* p) {
    return each([=](int i) { return static_cast<float>(p[i]); });
  }
  static void to_halves(const float* from, uint16_t* to) {
    for (int i = 0; i < 16; ++i) to[i] = half_of_float(from[i]);
  }
};

}  // namespace

const AttentionKernels kScalarAttention = NOMATMUL_ATTENTION(Scalar);

}  // namespace nomatmul
