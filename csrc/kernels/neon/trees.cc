// NEON: float vectors by the compiler; the ternary logit by the dot product of ARMv8.2.
#include <arm_neon.h>

#include "kernels/common/trees_ops.h"

namespace nomatmul {
namespace {

constexpr int kVec = 16;

struct Neon : OneByOne<Neon>, PlainIntegers, TernaryPlanes<kVec> {
  NOMATMUL_PLAIN_FLOATS(4)

  static int32_t dot_int8(const int8_t* row, const int16_t* x, int k) {
    int32x4_t sums[2] = {vdupq_n_s32(0), vdupq_n_s32(0)};
    int e = 0;
    for (; e + 8 <= k; e += 8) {
      const int16x8_t w = vmovl_s8(vld1_s8(row + e)), v = vld1q_s16(x + e);
      sums[0] = vmlal_s16(sums[0], vget_low_s16(w), vget_low_s16(v));
      sums[1] = vmlal_high_s16(sums[1], w, v);
    }
    const int32_t rest = PlainIntegers::dot_int8(row + e, x + e, k - e);
    return vaddvq_s32(vaddq_s32(sums[0], sums[1])) + rest;
  }
  static int32_t dot_ternary(const uint8_t* row, const int8_t* q, int k) {
    const int blocks = PlaneLayout(Packing::kTwoBit, kVec, 1, k).blocks;
    int32x4_t sum = vdupq_n_s32(0);
    for (int b = 0; b < blocks; ++b, q += 4 * kVec) {
      uint8x16_t packed = vld1q_u8(row + static_cast<size_t>(b) * kVec);
      for (int p = 0; p < 4; ++p) {
        const int8x16_t codes = vreinterpretq_s8_u8(vandq_u8(packed, vdupq_n_u8(3)));
        sum = vdotq_s32(sum, codes, vld1q_s8(q + p * kVec));
        packed = vshrq_n_u8(packed, 2);
      }
    }
    return vaddvq_s32(sum);
  }
};

}  // namespace

const TreeKernels kNeonTrees = NOMATMUL_TREES(Neon);

}  // namespace nomatmul
