// The AVX512-VNNI table: vectors.h for few tokens, register tiles of 4 rows x 6 tokens for more.
#include "kernels/ternary.h"
#include "kernels/avx512vnni/vectors.h"
#include "kernels/common/float_ops.h"

namespace nomatmul {
namespace {

struct Avx512 : FewTokens {
  static constexpr int kVec = 64;
  static constexpr int kTileRows = 4, kTileTokens = 6, kPanel = 8;
  static constexpr int kMaxBlockSteps = 40;  // 8 rows x 2560 codes + 6 tokens of q: 35 KB of L1
  static constexpr int kTokenBlockBytes = 512 * 1024;

  static constexpr int block_of(Packing packing) { return kMaxBlockSteps / planes_of(packing); }

  template <Packing packing>
  static void unpack(const uint8_t* w, size_t bytes, uint8_t* codes) {
    for (size_t at = 0; at < bytes; at += kVec, codes += planes_of(packing) * kVec) {
      fetch_ahead<4096>(w + at);
      Digits<packing> digits(load_part(w + at, bytes - at));
      unrolled<planes_of(packing)>([&](auto p) NOMATMUL_INLINE {
        store(codes + p * kVec, digits.template next<decltype(p)::value>());
      });
    }
  }

  template <int kTokens>
  static void tile(const uint8_t* codes, size_t code_stride, const int8_t* q, size_t q_stride,
                   int steps, int32_t* c, int ldc) {
    __m512i sums[kTokens][kTileRows];
    unrolled<kTokens>([&](auto t) NOMATMUL_INLINE {
      unrolled<kTileRows>([&](auto r) NOMATMUL_INLINE { sums[t][r] = _mm512_setzero_si512(); });
    });
    for (int step = 0; step < steps; ++step, codes += kVec, q += kVec) {
      __m512i code[kTileRows];
      unrolled<kTileRows>([&](auto r) NOMATMUL_INLINE {
        code[r] = load(codes + static_cast<size_t>(r) * code_stride);
        tie(code[r]);
      });
      unrolled<kTokens>([&](auto t) NOMATMUL_INLINE {
        const __m512i q_t = load(q + static_cast<size_t>(t) * q_stride);
        unrolled<kTileRows>([&](auto r)
                                NOMATMUL_INLINE { add_products(sums[t][r], code[r], q_t); });
      });
    }
    unrolled<kTokens>([&](auto t) NOMATMUL_INLINE {
      auto* c_t = reinterpret_cast<__m128i*>(c + t * ldc);
      const __m128i folded = fold4(sums[t][0], sums[t][1], sums[t][2], sums[t][3]);
      _mm_storeu_si128(c_t, _mm_add_epi32(_mm_loadu_si128(c_t), folded));
    });
  }
};

}  // namespace

const TernaryKernels kAvx512VnniTernary = NOMATMUL_TERNARY(PlaneProducts<Avx512>);

}  // namespace nomatmul
