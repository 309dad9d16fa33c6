// Causal attention for NEON; conversions of float16 are in every 64-bit Arm CPU.
#include <arm_neon.h>

#include "kernels/common/attention_ops.h"

namespace nomatmul {
namespace {

struct Neon {
  struct W {
    float32x4_t v[4];
  };
  static constexpr int kTile = 1;

  template <class F>
  static NOMATMUL_INLINE W each(F value) {
    return {{value(0), value(1), value(2), value(3)}};
  }
  static NOMATMUL_INLINE W zero() { return broadcast(0.0f); }
  static NOMATMUL_INLINE W load(const float* p) {
    return each([=](int i) { return vld1q_f32(p + 4 * i); });
  }
  static NOMATMUL_INLINE void store(float* p, const W& w) {
    for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, w.v[i]);
  }
  static NOMATMUL_INLINE W broadcast(float x) {
    return each([=](int) { return vdupq_n_f32(x); });
  }
  static NOMATMUL_INLINE W multiply(const W& a, const W& b) {
    return each([&](int i) { return vmulq_f32(a.v[i], b.v[i]); });
  }
  static NOMATMUL_INLINE W fma(const W& a, const W& b, const W& c) {
    return each([&](int i) { return vfmaq_f32(c.v[i], a.v[i], b.v[i]); });
  }
  static NOMATMUL_INLINE W halves(const uint16_t* p) {
    return each([=](int i) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i))); });
  }
  static NOMATMUL_INLINE W bytes(const int8_t* p) {
    const int8x16_t all = vld1q_s8(p);
    const int16x8_t low = vmovl_s8(vget_low_s8(all)), high = vmovl_s8(vget_high_s8(all));
    return {{vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))),
             vcvtq_f32_s32(vmovl_s16(vget_high_s16(low))),
             vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))),
             vcvtq_f32_s32(vmovl_s16(vget_high_s16(high)))}};
  }
  static void to_halves(const float* from, uint16_t* to) {
    for (int i = 0; i < 16; i += 4) {
      vst1_u16(to + i, vreinterpret_u16_f16(vcvt_f16_f32(vld1q_f32(from + i))));
    }
  }
};

}  // namespace

const AttentionKernels kNeonAttention = NOMATMUL_ATTENTION(Neon);

}  // namespace nomatmul
