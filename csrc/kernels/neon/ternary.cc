// NEON with the dot product (ARMv8.2): 16-byte vectors; code x activation, both signed bytes,
// summed by fours into int32 lanes by sdot, which cannot leave int32 below kMaxElements elements.
#include <arm_neon.h>

#include "kernels/common/float_ops.h"
#include "kernels/common/product_entry.h"
#include "kernels/ternary.h"

namespace nomatmul {
namespace {

struct Neon {
  static constexpr int kVec = 16;
  using V = int8x16_t;
  using Sum = int32x4_t;

  static V load(const void* p) { return vld1q_s8(static_cast<const int8_t*>(p)); }
  static V load_packed(const uint8_t* p, size_t) { return load(p); }  // rows are whole vectors
  static void fetch_ahead(const uint8_t*) {}
  static void store(uint8_t* p, V v) { vst1q_u8(p, vreinterpretq_u8_s8(v)); }
  static void tie(V&) {}

  template <int kPlane>
  NOMATMUL_INLINE static V two_bit(V& packed) {
    const V code = vandq_s8(packed, vdupq_n_s8(3));
    if (kPlane < 3) packed = vreinterpretq_s8_u8(vshrq_n_u8(vreinterpretq_u8_s8(packed), 2));
    return code;
  }
  // The byte is a fraction x / 256 and its next digit is floor(3 x / 256): 1 from 86 on, 2 from 171
  // on; what is left is 3 x mod 256.
  template <int kPlane>
  NOMATMUL_INLINE static V base3(V& left) {
    const uint8x16_t fraction = vreinterpretq_u8_s8(left);
    const uint8x16_t one = vcgtq_u8(fraction, vdupq_n_u8(85));  // 0 or -1
    const uint8x16_t two = vcgtq_u8(fraction, vdupq_n_u8(170));
    if (kPlane < 4) left = vaddq_s8(left, vaddq_s8(left, left));
    return vnegq_s8(vreinterpretq_s8_u8(vaddq_u8(one, two)));
  }
  NOMATMUL_INLINE static void add_product(Sum& sum, V codes, V q) {
    sum = vdotq_s32(sum, codes, q);
  }
  static void fold(const Sum (&v)[4], int32_t* out) {
    vst1q_s32(out, vpaddq_s32(vpaddq_s32(v[0], v[1]), vpaddq_s32(v[2], v[3])));
  }

  static constexpr int kFewTokens = 4;
  template <Packing packing, int kTokens>
  static void few(const Operands& op) {
    few_tokens<Neon, packing, kTokens>(op);
  }

  static constexpr int kTileTokens = 5, kPanelVectors = 4, kRun = kMaxElements;
  static constexpr int passes(Packing) { return 0; }
  static constexpr int block_of(Packing) { return 16; }  // 16 rows: 16 or 20 KB of L1

  static void transpose(V (&rows)[4]) {
    const auto word = [&](int r) { return vreinterpretq_s32_s8(rows[r]); };
    const int32x4_t a = vtrn1q_s32(word(0), word(1)), b = vtrn2q_s32(word(0), word(1));
    const int32x4_t c = vtrn1q_s32(word(2), word(3)), d = vtrn2q_s32(word(2), word(3));
    rows[0] = pairs<false>(a, c), rows[1] = pairs<false>(b, d);
    rows[2] = pairs<true>(a, c), rows[3] = pairs<true>(b, d);
  }
  // The low or high halves of both.
  template <bool kHigh>
  static V pairs(int32x4_t a, int32x4_t b) {
    const int64x2_t x = vreinterpretq_s64_s32(a), y = vreinterpretq_s64_s32(b);
    return vreinterpretq_s8_s64(kHigh ? vtrn2q_s64(x, y) : vtrn1q_s64(x, y));
  }
  static void fetch_line(const uint8_t*) {}
  static V four(const uint8_t* p) {
    int32_t word;
    std::memcpy(&word, p, sizeof word);
    return vreinterpretq_s8_s32(vdupq_n_s32(word));
  }
  static void add_lanes(int32_t* c, Sum sum) { vst1q_s32(c, vaddq_s32(vld1q_s32(c), sum)); }
};

}  // namespace

const TernaryKernels kNeonTernary = NOMATMUL_TERNARY(PlaneProducts<Neon>);

}  // namespace nomatmul
