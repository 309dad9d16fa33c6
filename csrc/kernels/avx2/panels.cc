// Panels for AVX2: 8 rows a vector. Codes and int8 go through vpmaddubsw.
//
// Bounds: a code is 0..2 and q within -127..127, so one vpmaddubsw adds at most 508 to an int16
// lane, or 2032 where codes are 4 times too large: 64 and 16 of them fit. kRun vectors of two bits
// make 16 of the latter. Of int8, |w| * |q| * 2 is at most 128 * 127 * 2 < 2^15.
#include <immintrin.h>

#include "kernels/common/float_rows.h"

namespace nomatmul {
namespace {

struct Avx2 {
  using Bytes = __m256i;
  using Ints = __m256i;
  using Floats = __m256;
  static constexpr int kVectors = 2;
  static constexpr int kRun = 8;
  static constexpr int kPanels = 1, kTokens = 4, kFloatRows = 4;
  static constexpr int kInt8Bias = 0;

  // Ties a sum to a register: GCC otherwise copies and spills it.
  NOMATMUL_INLINE static void tie(__m256i& v) { __asm__("" : "+x"(v)); }
  NOMATMUL_INLINE static Ints pairs(__m256i v) {
    return _mm256_madd_epi16(v, _mm256_set1_epi16(1));
  }

  struct Ternary {
    using Sum = __m256i;  // of int16
    NOMATMUL_INLINE static Sum start() { return _mm256_setzero_si256(); }
    NOMATMUL_INLINE static void add(Sum& sum, Bytes weights, Bytes q) {
      sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(weights, q));
      tie(sum);
    }
    NOMATMUL_INLINE static Ints total(Sum sum) { return pairs(sum); }
  };
  struct Int8 {
    using Sum = __m256i;
    NOMATMUL_INLINE static Sum start() { return _mm256_setzero_si256(); }
    NOMATMUL_INLINE static void add(Sum& sum, Bytes weights, Bytes q) {
      const __m256i products =
          _mm256_maddubs_epi16(_mm256_abs_epi8(weights), _mm256_sign_epi8(q, weights));
      sum = _mm256_add_epi32(sum, pairs(products));
      tie(sum);
    }
    NOMATMUL_INLINE static Ints total(Sum sum) { return sum; }
  };

  static Bytes load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static void store(void* p, Bytes v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
  // A prefetch never faults, so it may lie past the end; an integer, because a pointer may not.
  NOMATMUL_INLINE static void fetch_ahead(const uint8_t* p) {
    const uintptr_t at = reinterpret_cast<uintptr_t>(p) + 12288;
    _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T0);
  }
  NOMATMUL_INLINE static Bytes splat4(const int8_t* p) {
    int32_t four;
    std::memcpy(&four, p, sizeof four);
    return _mm256_set1_epi32(four);
  }
  template <bool kLow>
  NOMATMUL_INLINE static Bytes three(Bytes v) {
    return _mm256_and_si256(v, _mm256_set1_epi8(kLow ? 3 : 12));
  }
  template <int kBits>
  NOMATMUL_INLINE static Bytes lower(Bytes v) {
    return _mm256_srli_epi16(v, kBits);
  }

  static Ints none() { return _mm256_setzero_si256(); }
  static Ints plus(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
  static Ints fourth(Ints v) { return _mm256_srai_epi32(v, 2); }
  static Ints less(Ints v, int32_t by) { return _mm256_sub_epi32(v, _mm256_set1_epi32(by)); }
  static Floats floats_of(Ints v) { return _mm256_cvtepi32_ps(v); }

  static Floats zero() { return _mm256_setzero_ps(); }
  static Floats splat(float v) { return _mm256_set1_ps(v); }
  static Floats times(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
  static Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
  static Floats load_floats(const float* p) { return _mm256_loadu_ps(p); }
  static void store_floats(float* p, Floats v) { _mm256_storeu_ps(p, v); }
  static __m128i eight(const uint8_t* p) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  }
  static Floats load_halves(const uint8_t* p) { return _mm256_cvtph_ps(eight(p)); }
  static Floats load_bfloats(const uint8_t* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(eight(p)), 16));
  }
};

}  // namespace

const PanelKernels kAvx2Panels = {Avx2::kInt8Bias, prepare_tile, Panels<Avx2>::scratch_bytes,
                                  Panels<Avx2>::product, float_product<Avx2>};

}  // namespace nomatmul
