// NEON with the dot product (ARMv8.2): 16-byte vectors; code x activation, both signed bytes,
// summed by fours into int32 lanes by sdot, which cannot leave int32 below kMaxElements elements.
#include <arm_neon.h>

#include "kernels/common/float_ops.h"
#include "kernels/common/product_entry.h"
#include "kernels/common/unroll.h"
#include "kernels/ternary.h"

namespace nomatmul {
namespace {

constexpr int kVec = 16;

inline int8x16_t load(const void* p) { return vld1q_s8(static_cast<const int8_t*>(p)); }

// Lane sums of four vectors.
inline int32x4_t fold4(int32x4_t a, int32x4_t b, int32x4_t c, int32x4_t d) {
  return vpaddq_s32(vpaddq_s32(a, b), vpaddq_s32(c, d));
}

// Takes one vector of packed bytes apart: next<p>() is the codes of plane p, asked for in order.
template <Packing packing>
class Digits;

template <>
class Digits<Packing::kTwoBit> {
 public:
  Digits() = default;
  NOMATMUL_INLINE explicit Digits(int8x16_t packed) : packed_(vreinterpretq_u8_s8(packed)) {}
  template <int kPlane>
  NOMATMUL_INLINE int8x16_t next() {
    const uint8x16_t code = vandq_u8(packed_, vdupq_n_u8(3));
    if (kPlane < 3) packed_ = vshrq_n_u8(packed_, 2);
    return vreinterpretq_s8_u8(code);
  }

 private:
  uint8x16_t packed_;
};

// The byte is a fraction x / 256 and its next digit is floor(3 x / 256): 1 from 86 on, 2 from 171
// on; what is left is 3 x mod 256.
template <>
class Digits<Packing::kBase3> {
 public:
  Digits() = default;
  NOMATMUL_INLINE explicit Digits(int8x16_t packed) : fraction_(vreinterpretq_u8_s8(packed)) {}
  template <int kPlane>
  NOMATMUL_INLINE int8x16_t next() {
    const uint8x16_t one = vcgtq_u8(fraction_, vdupq_n_u8(85));  // 0 or -1
    const uint8x16_t two = vcgtq_u8(fraction_, vdupq_n_u8(170));
    if (kPlane < 4) fraction_ = vaddq_u8(fraction_, vaddq_u8(fraction_, fraction_));
    return vnegq_s8(vreinterpretq_s8_u8(vaddq_u8(one, two)));
  }

 private:
  uint8x16_t fraction_;
};

// --- few tokens: codes stay in registers ----------------------------------------------------

template <Packing packing, int kTokens>
void few_tokens(const Operands& op) {
  constexpr int kRows = 4, kPlanes = planes_of(packing);
  const size_t q_stride = op.layout.bytes_per_token;
  for (int n = op.n0; n < op.n1; n += kRows) {
    const int count = at_most(kRows, op.n1 - n);
    const uint8_t* rows[kRows];
    op.rows_from(n, count, rows);
    int32x4_t sums[kTokens][kRows];
    unrolled<kTokens>([&](auto t) NOMATMUL_INLINE {
      unrolled<kRows>([&](auto r) NOMATMUL_INLINE { sums[t][r] = vdupq_n_s32(0); });
    });
    const int8_t* q = op.q;
    for (int b = 0; b < op.layout.blocks; ++b, q += kPlanes * kVec) {
      Digits<packing> digits[kRows];
      unrolled<kRows>([&](auto r) NOMATMUL_INLINE {
        digits[r] = Digits<packing>(load(rows[r] + static_cast<size_t>(b) * kVec));
      });
      unrolled<kPlanes>([&](auto p) NOMATMUL_INLINE {
        int8x16_t codes[kRows];
        unrolled<kRows>([&](auto r) NOMATMUL_INLINE {
          codes[r] = digits[r].template next<decltype(p)::value>();
        });
        unrolled<kTokens>([&](auto t) NOMATMUL_INLINE {
          const int8x16_t q_t = load(q + static_cast<size_t>(t) * q_stride + p * kVec);
          unrolled<kRows>(
              [&](auto r) NOMATMUL_INLINE { sums[t][r] = vdotq_s32(sums[t][r], codes[r], q_t); });
        });
      });
    }
    unrolled<kTokens>([&](auto t) NOMATMUL_INLINE {
      int32_t folded[4];
      vst1q_s32(folded, fold4(sums[t][0], sums[t][1], sums[t][2], sums[t][3]));
      op.write(t, n, folded, count);
    });
  }
}

// --- more tokens: see gemm.h ----------------------------------------------------------------

struct Neon {
  static constexpr int kVec = 16;
  static constexpr int kTileRows = 4, kTileTokens = 5, kPanel = 8;
  static constexpr int kMaxBlockSteps = 120;  // 8 rows x 1920 codes + 5 tokens of q: 25 KB of L1
  static constexpr int kTokenBlockBytes = 256 * 1024;
  static constexpr int kFewTokens = 4;

  template <Packing packing, int kTokens>
  static void few(const Operands& op) {
    few_tokens<packing, kTokens>(op);
  }

  static constexpr int block_of(Packing packing) { return kMaxBlockSteps / planes_of(packing); }

  template <Packing packing>
  static void unpack(const uint8_t* w, size_t bytes, uint8_t* codes) {
    for (size_t at = 0; at < bytes; at += kVec, codes += planes_of(packing) * kVec) {
      Digits<packing> digits(load(w + at));
      unrolled<planes_of(packing)>([&](auto p) NOMATMUL_INLINE {
        vst1q_u8(codes + p * kVec, vreinterpretq_u8_s8(digits.template next<decltype(p)::value>()));
      });
    }
  }

  template <int kTokens>
  static void tile(const uint8_t* codes, size_t code_stride, const int8_t* q, size_t q_stride,
                   int steps, int32_t* c, int ldc) {
    int32x4_t sums[kTokens][kTileRows];
    unrolled<kTokens>([&](auto t) NOMATMUL_INLINE {
      unrolled<kTileRows>([&](auto r) NOMATMUL_INLINE { sums[t][r] = vdupq_n_s32(0); });
    });
    for (int step = 0; step < steps; ++step, codes += kVec, q += kVec) {
      int8x16_t code[kTileRows];
      unrolled<kTileRows>([&](auto r) NOMATMUL_INLINE {
        code[r] = load(codes + static_cast<size_t>(r) * code_stride);
      });
      unrolled<kTokens>([&](auto t) NOMATMUL_INLINE {
        const int8x16_t q_t = load(q + static_cast<size_t>(t) * q_stride);
        unrolled<kTileRows>(
            [&](auto r) NOMATMUL_INLINE { sums[t][r] = vdotq_s32(sums[t][r], code[r], q_t); });
      });
    }
    unrolled<kTokens>([&](auto t) NOMATMUL_INLINE {
      int32_t* c_t = c + t * ldc;
      const int32x4_t folded = fold4(sums[t][0], sums[t][1], sums[t][2], sums[t][3]);
      vst1q_s32(c_t, vaddq_s32(vld1q_s32(c_t), folded));
    });
  }
};

}  // namespace

const TernaryKernels kNeonTernary = NOMATMUL_TERNARY(PlaneProducts<Neon>);

}  // namespace nomatmul
