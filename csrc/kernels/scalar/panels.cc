// The plain form of panels: what the others are tested against.
#include <cmath>

#include "kernels/common/float_rows.h"
#include "kernels/common/half.h"

namespace nomatmul {
namespace {

struct Scalar {
  struct Bytes {
    uint8_t v[64];
  };
  struct Ints {
    int32_t v[16];
  };
  struct Floats {
    float v[16];
  };
  static constexpr int kVectors = 1;
  static constexpr int kRun = 1 << 20;
  static constexpr int kPanels = 1, kTokens = 1, kFloatRows = 1;
  static constexpr int kInt8Bias = 0;

  template <class To, class F>
  static To each(F&& f) {
    To to;
    for (int i = 0; i < static_cast<int>(sizeof to.v / sizeof to.v[0]); ++i) to.v[i] = f(i);
    return to;
  }

  // Codes are bytes below 128, so both forms take weights as signed ones.
  struct Int8 {
    using Sum = Ints;
    static Sum start() {
      return each<Ints>([](int) { return 0; });
    }
    static void add(Sum& sum, const Bytes& weights, const Bytes& q) {
      for (int i = 0; i < 64; ++i) {
        sum.v[i / 4] += static_cast<int8_t>(weights.v[i]) * static_cast<int8_t>(q.v[i]);
      }
    }
    static Ints total(const Sum& sum) { return sum; }
  };
  using Ternary = Int8;

  static Bytes load(const uint8_t* p) {
    return each<Bytes>([=](int i) { return p[i]; });
  }
  static void store(uint8_t* p, const Bytes& v) { std::memcpy(p, v.v, sizeof v.v); }
  static void fetch_ahead(const uint8_t*) {}
  static Bytes splat4(const int8_t* p) {
    return each<Bytes>([=](int i) { return static_cast<uint8_t>(p[i % 4]); });
  }
  template <bool kLow>
  static Bytes three(const Bytes& v) {
    return each<Bytes>([&](int i) { return static_cast<uint8_t>(v.v[i] & (kLow ? 3 : 12)); });
  }
  template <int kBits>
  static Bytes lower(const Bytes& v) {
    return each<Bytes>([&](int i) { return static_cast<uint8_t>(v.v[i] >> kBits); });
  }

  static Ints none() { return Int8::start(); }
  static Ints plus(const Ints& a, const Ints& b) {
    return each<Ints>([&](int i) { return a.v[i] + b.v[i]; });
  }
  static Ints fourth(const Ints& v) {
    return each<Ints>([&](int i) { return v.v[i] >> 2; });
  }
  static Ints less(const Ints& v, int32_t by) {
    return each<Ints>([&](int i) { return v.v[i] - by; });
  }
  static Floats floats_of(const Ints& v) {
    return each<Floats>([&](int i) { return static_cast<float>(v.v[i]); });
  }

  static Floats zero() { return splat(0.0f); }
  static Floats splat(float v) {
    return each<Floats>([=](int) { return v; });
  }
  static Floats times(const Floats& a, const Floats& b) {
    return each<Floats>([&](int i) { return a.v[i] * b.v[i]; });
  }
  static Floats fma(const Floats& a, const Floats& b, const Floats& c) {
    return each<Floats>([&](int i) { return std::fma(a.v[i], b.v[i], c.v[i]); });
  }
  static Floats load_floats(const float* p) {
    return each<Floats>([=](int i) { return p[i]; });
  }
  static void store_floats(float* p, const Floats& v) { std::memcpy(p, v.v, sizeof v.v); }
  static Floats load_halves(const uint8_t* p) {
    return each<Floats>([=](int i) {
      uint16_t half;
      std::memcpy(&half, p + 2 * i, sizeof half);
      return float_of_half(half);
    });
  }
  static Floats load_bfloats(const uint8_t* p) {
    return each<Floats>([=](int i) {
      uint16_t half;
      std::memcpy(&half, p + 2 * i, sizeof half);
      const uint32_t bits = static_cast<uint32_t>(half) << 16;
      float value;
      std::memcpy(&value, &bits, sizeof value);
      return value;
    });
  }
};

}  // namespace

const PanelKernels kScalarPanels = {Scalar::kInt8Bias, prepare_tile, Panels<Scalar>::scratch_bytes,
                                    Panels<Scalar>::product, float_product<Scalar>};

}  // namespace nomatmul
