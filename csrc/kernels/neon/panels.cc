// Panels for NEON with the dot product: 4 rows a vector.
#include <arm_neon.h>

#include "kernels/common/float_rows.h"

namespace nomatmul {
namespace {

struct Neon {
  using Bytes = int8x16_t;
  using Ints = int32x4_t;
  using Floats = float32x4_t;
  static constexpr int kVectors = 4;
  static constexpr int kRun = 1 << 20;
  static constexpr int kPanels = 1, kTokens = 4, kFloatRows = 4;
  static constexpr int kInt8Bias = 0;

  struct Int8 {
    using Sum = int32x4_t;
    static Sum start() { return vdupq_n_s32(0); }
    NOMATMUL_INLINE static void add(Sum& sum, Bytes weights, Bytes q) {
      sum = vdotq_s32(sum, weights, q);
    }
    static Ints total(Sum sum) { return sum; }
  };
  using Ternary = Int8;

  static Bytes load(const uint8_t* p) { return vreinterpretq_s8_u8(vld1q_u8(p)); }
  static void store(uint8_t* p, Bytes v) { vst1q_u8(p, vreinterpretq_u8_s8(v)); }
  static void fetch_ahead(const uint8_t*) {}
  NOMATMUL_INLINE static Bytes splat4(const int8_t* p) {
    int32_t four;
    std::memcpy(&four, p, sizeof four);
    return vreinterpretq_s8_s32(vdupq_n_s32(four));
  }
  template <bool kLow>
  NOMATMUL_INLINE static Bytes three(Bytes v) {
    return vandq_s8(v, vdupq_n_s8(kLow ? 3 : 12));
  }
  template <int kBits>
  NOMATMUL_INLINE static Bytes lower(Bytes v) {
    if constexpr (kBits == 0) {
      return v;
    } else {
      return vreinterpretq_s8_u8(vshrq_n_u8(vreinterpretq_u8_s8(v), kBits));
    }
  }

  static Ints none() { return vdupq_n_s32(0); }
  static Ints plus(Ints a, Ints b) { return vaddq_s32(a, b); }
  static Ints fourth(Ints v) { return vshrq_n_s32(v, 2); }
  static Ints less(Ints v, int32_t by) { return vsubq_s32(v, vdupq_n_s32(by)); }
  static Floats floats_of(Ints v) { return vcvtq_f32_s32(v); }

  static Floats zero() { return vdupq_n_f32(0); }
  static Floats splat(float v) { return vdupq_n_f32(v); }
  static Floats times(Floats a, Floats b) { return vmulq_f32(a, b); }
  static Floats fma(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }
  static Floats load_floats(const float* p) { return vld1q_f32(p); }
  static void store_floats(float* p, Floats v) { vst1q_f32(p, v); }
  static uint16x4_t four_halves(const uint8_t* p) {
    uint16x4_t v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  static Floats load_halves(const uint8_t* p) {
    return vcvt_f32_f16(vreinterpret_f16_u16(four_halves(p)));
  }
  static Floats load_bfloats(const uint8_t* p) {
    return vreinterpretq_f32_u32(vshll_n_u16(four_halves(p), 16));
  }
};

}  // namespace

const PanelKernels kNeonPanels = {Neon::kInt8Bias, prepare_tile, Panels<Neon>::scratch_bytes,
                                  Panels<Neon>::product, float_product<Neon>};

}  // namespace nomatmul
