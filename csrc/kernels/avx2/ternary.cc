// AVX2: 32-byte vectors; u8 code x s8 activation through vpmaddubsw into int16 pair sums.
//
// Bounds: a code is 0..2 and q is -128..127, so one vpmaddubsw adds -512..508 to an int16 lane;
// 64 of them stay within -32768..32512. Sums go over to int32 at the latest then: each 16 blocks of
// 4 planes (2 bits) or each 12 blocks of 5 planes (base 3; 60 additions).
#include <immintrin.h>

#include "kernels/common/float_ops.h"
#include "kernels/common/product_entry.h"
#include "kernels/common/unroll.h"
#include "kernels/ternary.h"

namespace nomatmul {
namespace {

constexpr int kVec = 32;
constexpr int kMaxAdds = 64;
constexpr int run_of(Packing packing) { return kMaxAdds / planes_of(packing); }

inline __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
// Prefetches what lies some bytes further on, into the second level: the first has too few places
// for lines on their way (docs/log/cpu-decoder.md). A prefetch never faults, so that may be past
// the end of the weights; an integer, because a pointer may not point there. Always inline: GCC
// drops calls of a function that only prefetches.
template <size_t kAhead = 8192>
NOMATMUL_INLINE inline void fetch_ahead(const uint8_t* p) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(p) + kAhead;
  _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T1);
}
inline __m256i widen(__m256i sums16) { return _mm256_madd_epi16(sums16, _mm256_set1_epi16(1)); }

// Lane sums of four vectors.
inline __m128i fold4(__m256i a, __m256i b, __m256i c, __m256i d) {
  const __m256i ab = _mm256_hadd_epi32(a, b), cd = _mm256_hadd_epi32(c, d);
  const __m256i all = _mm256_hadd_epi32(ab, cd);
  return _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
}

// The vectors of digits.h. A sum has 16-bit lanes, so kMaxAdds products fit.
struct Vectors {
  static constexpr int kVec = nomatmul::kVec;
  using V = __m256i;
  using Sum = __m256i;

  static V load(const void* p) { return nomatmul::load(p); }
  static V load_packed(const uint8_t* p, size_t) { return load(p); }  // rows are whole vectors
  static void store(void* p, V v) { _mm256_storeu_si256(static_cast<V*>(p), v); }
  NOMATMUL_INLINE static void tie(V& v) { __asm__("" : "+x"(v)); }

  template <int kPlane>
  NOMATMUL_INLINE static V two_bit(const V& packed) {
    return _mm256_and_si256(_mm256_srli_epi16(packed, 2 * kPlane), _mm256_set1_epi8(3));
  }
  // The byte is a fraction x / 256 and its next digit is floor(3 x / 256): 1 from 86 on, 2 from 171
  // on; what is left is 3 x mod 256. Kept as x - 128, which tripling keeps (mod 256), because AVX2
  // compares signed bytes only.
  template <int kPlane>
  NOMATMUL_INLINE static V base3(V& fraction) {
    if (kPlane == 0) fraction = _mm256_xor_si256(fraction, _mm256_set1_epi8(-128));
    const V one = _mm256_cmpgt_epi8(fraction, _mm256_set1_epi8(85 - 128));
    const V two = _mm256_cmpgt_epi8(fraction, _mm256_set1_epi8(170 - 128));
    if (kPlane < 4) fraction = _mm256_add_epi8(fraction, _mm256_add_epi8(fraction, fraction));
    return _mm256_abs_epi8(_mm256_add_epi8(one, two));
  }
  // Tied to one register: GCC otherwise copies and spills accumulators.
  NOMATMUL_INLINE static void add_product(Sum& sum, V codes, V q) {
    sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(codes, q));
    tie(sum);
  }
  static void fold(const Sum (&v)[4], int32_t* out) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out),
                     fold4(widen(v[0]), widen(v[1]), widen(v[2]), widen(v[3])));
  }
};

// --- few tokens: codes stay in registers ----------------------------------------------------

template <int kTokens, int kRows>
struct Few {
  __m256i sums16[kRows][kTokens], sums32[kRows][kTokens];

  template <class Body>
  NOMATMUL_INLINE static void each(Body&& body) {
    unrolled<kRows>([&](auto r) NOMATMUL_INLINE {
      unrolled<kTokens>([&](auto t) NOMATMUL_INLINE { body(r, t); });
    });
  }

  template <Packing packing>
  NOMATMUL_INLINE void block(const uint8_t* const (&rows)[kRows], size_t at, const int8_t* q,
                             size_t q_stride) {
    Digits<Vectors, packing> digits[kRows];
    unrolled<kRows>([&](auto r) NOMATMUL_INLINE {
      if (at % 64 == 0) fetch_ahead(rows[r] + at);  // two vectors make a line
      digits[r] = Digits<Vectors, packing>(load(rows[r] + at));
    });
    unrolled<planes_of(packing)>([&](auto plane) NOMATMUL_INLINE {
      __m256i codes[kRows];
      unrolled<kRows>([&](auto r) NOMATMUL_INLINE {
        codes[r] = digits[r].template next<decltype(plane)::value>();
      });
      unrolled<kTokens>([&](auto t) NOMATMUL_INLINE {
        const __m256i q_t = load(q + static_cast<size_t>(t) * q_stride + plane * kVec);
        unrolled<kRows>([&](auto r)
                            NOMATMUL_INLINE { Vectors::add_product(sums16[r][t], codes[r], q_t); });
      });
    });
  }

  template <Packing packing>
  NOMATMUL_INLINE void run(const uint8_t* const (&rows)[kRows], const int8_t* q, size_t q_stride,
                           int blocks) {
    each([&](auto r, auto t) NOMATMUL_INLINE { sums32[r][t] = _mm256_setzero_si256(); });
    for (int first = 0; first < blocks; first += run_of(packing)) {
      const int last = at_most(first + run_of(packing), blocks);
      each([&](auto r, auto t) NOMATMUL_INLINE { sums16[r][t] = _mm256_setzero_si256(); });
      for (int b = first; b < last; ++b) {
        const size_t at = static_cast<size_t>(b) * kVec;
        block<packing>(rows, at, q + at * planes_of(packing), q_stride);
      }
      each([&](auto r, auto t) NOMATMUL_INLINE {
        sums32[r][t] = _mm256_add_epi32(sums32[r][t], widen(sums16[r][t]));
      });
    }
  }

  template <Packing packing>
  static void product(const Operands& op) {
    for (int n = op.n0; n < op.n1; n += kRows) {
      const int count = at_most(kRows, op.n1 - n);
      const uint8_t* rows[kRows];
      op.rows_from(n, count, rows);
      Few few;
      few.template run<packing>(rows, op.q, op.layout.bytes_per_token, op.layout.blocks);
      unrolled<kTokens>([&](auto t) NOMATMUL_INLINE {
        const __m256i zero = _mm256_setzero_si256();
        int32_t folded[4];
        const __m128i sums = fold4(few.sums32[0][t], kRows > 1 ? few.sums32[1 % kRows][t] : zero,
                                   kRows > 2 ? few.sums32[2 % kRows][t] : zero,
                                   kRows > 3 ? few.sums32[3 % kRows][t] : zero);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(folded), sums);
        op.write(t, n, folded, count);
      });
    }
  }
};

// --- one token --------------------------------------------------------------------------------

// Two bits: planes 1 and 3 are masked where they stand in a half of the byte, 4 times too large,
// and have a sum of their own; a vpmaddubsw of those adds -2048..2032, so 8 blocks of two fit.
template <int kRows>
struct OneTokenTwoBit {
  static constexpr int kRun = 8;
  __m256i units[kRows], fours[kRows], total_units[kRows], total_fours[kRows];

  NOMATMUL_INLINE void start() {
    unrolled<kRows>([&](auto r) NOMATMUL_INLINE {
      units[r] = fours[r] = total_units[r] = total_fours[r] = _mm256_setzero_si256();
    });
  }
  NOMATMUL_INLINE void block(const uint8_t* const (&rows)[kRows], size_t at, const int8_t* q) {
    const __m256i unit = _mm256_set1_epi8(3), four = _mm256_set1_epi8(12);
    unrolled<kRows>([&](auto r) NOMATMUL_INLINE {
      const __m256i low = load(rows[r] + at), high = _mm256_srli_epi16(low, 4);
      Vectors::add_product(units[r], _mm256_and_si256(low, unit), load(q));
      Vectors::add_product(fours[r], _mm256_and_si256(low, four), load(q + kVec));
      Vectors::add_product(units[r], _mm256_and_si256(high, unit), load(q + 2 * kVec));
      Vectors::add_product(fours[r], _mm256_and_si256(high, four), load(q + 3 * kVec));
    });
  }
  NOMATMUL_INLINE void drain() {
    unrolled<kRows>([&](auto r) NOMATMUL_INLINE {
      total_units[r] = _mm256_add_epi32(total_units[r], widen(units[r]));
      total_fours[r] = _mm256_add_epi32(total_fours[r], widen(fours[r]));
      units[r] = fours[r] = _mm256_setzero_si256();
    });
  }
  NOMATMUL_INLINE __m256i total(int r) const {
    return _mm256_add_epi32(total_units[r], _mm256_srai_epi32(total_fours[r], 2));
  }
};

// Base 3, digit by digit. One sum a plane: the chains are shorter.
template <int kRows>
struct OneTokenBase3 {
  static constexpr int kRun = kMaxAdds;
  __m256i sums[kRows][5], totals[kRows];

  NOMATMUL_INLINE void start() {
    unrolled<kRows>([&](auto r) NOMATMUL_INLINE {
      totals[r] = _mm256_setzero_si256();
      unrolled<5>([&](auto p) NOMATMUL_INLINE { sums[r][p] = _mm256_setzero_si256(); });
    });
  }
  NOMATMUL_INLINE void block(const uint8_t* const (&rows)[kRows], size_t at, const int8_t* q) {
    unrolled<kRows>([&](auto r) NOMATMUL_INLINE {
      Digits<Vectors, Packing::kBase3> digits(load(rows[r] + at));
      unrolled<5>([&](auto p) NOMATMUL_INLINE {
        Vectors::add_product(sums[r][p], digits.template next<decltype(p)::value>(),
                             load(q + p * kVec));
      });
    });
  }
  NOMATMUL_INLINE void drain() {
    unrolled<kRows>([&](auto r) NOMATMUL_INLINE {
      unrolled<5>([&](auto p) NOMATMUL_INLINE {
        totals[r] = _mm256_add_epi32(totals[r], widen(sums[r][p]));
        sums[r][p] = _mm256_setzero_si256();
      });
    });
  }
  NOMATMUL_INLINE __m256i total(int r) const { return totals[r]; }
};

// Rows that are read together; two vectors of each make a line.
template <class Sums, int kRows>
NOMATMUL_INLINE inline void sum_rows(Sums& sums, const uint8_t* const (&rows)[kRows],
                                     const int8_t* q, size_t q_block, int blocks) {
  sums.start();
  for (int first = 0; first < blocks; first += Sums::kRun) {
    const int last = at_most(first + Sums::kRun, blocks);
    int b = first;
    for (; b + 2 <= last; b += 2, q += 2 * q_block) {
      const size_t at = static_cast<size_t>(b) * kVec;
      unrolled<kRows>([&](auto r) NOMATMUL_INLINE { fetch_ahead(rows[r] + at); });
      sums.block(rows, at, q);
      sums.block(rows, at + kVec, q + q_block);
    }
    for (; b < last; ++b, q += q_block) sums.block(rows, static_cast<size_t>(b) * kVec, q);
    sums.drain();
  }
}

template <class Sums, int kRows>
void one_token(const Operands& op) {
  const size_t q_block = static_cast<size_t>(op.layout.planes) * kVec;
  for (int n = op.n0; n < op.n1; n += 4) {
    const int count = at_most(4, op.n1 - n);
    __m256i totals[4];
    for (int part = 0; part < 4; part += kRows) {
      const int first = at_most(part, count - 1);
      const uint8_t* rows[kRows];
      op.rows_from(n + first, count - first, rows);
      Sums sums;
      sum_rows(sums, rows, op.q, q_block, op.layout.blocks);
      unrolled<kRows>([&](auto r) NOMATMUL_INLINE { totals[part + r] = sums.total(r); });
    }
    int32_t folded[4];
    _mm_storeu_si128(reinterpret_cast<__m128i*>(folded),
                     fold4(totals[0], totals[1], totals[2], totals[3]));
    op.write(0, n, folded, count);
  }
}

// --- more tokens: see gemm.h ----------------------------------------------------------------

struct Avx2 : Vectors {
  static constexpr int kTileTokens = 5, kPanelVectors = 2, kRun = kMaxAdds;
  static constexpr int passes(Packing) { return 0; }
  static constexpr int block_of(Packing) { return 8; }  // 16 rows: 16 or 20 KB of L1

  NOMATMUL_INLINE static void transpose(V (&rows)[8]) {
    V pairs[8], fours[8];
    unrolled<4>([&](auto i) NOMATMUL_INLINE {
      pairs[2 * i] = _mm256_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
      pairs[2 * i + 1] = _mm256_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
    });
    unrolled<2>([&](auto i) NOMATMUL_INLINE {  // fours[4 i + j]: columns j and j + 4
      unrolled<2>([&](auto j) NOMATMUL_INLINE {
        const V a = pairs[4 * i + j], b = pairs[4 * i + 2 + j];
        fours[4 * i + 2 * j] = _mm256_unpacklo_epi64(a, b);
        fours[4 * i + 2 * j + 1] = _mm256_unpackhi_epi64(a, b);
      });
    });
    unrolled<4>([&](auto j) NOMATMUL_INLINE {
      rows[j] = _mm256_permute2x128_si256(fours[j], fours[j + 4], 0x20);
      rows[j + 4] = _mm256_permute2x128_si256(fours[j], fours[j + 4], 0x31);
    });
  }
  NOMATMUL_INLINE static void fetch_line(const uint8_t* p) { nomatmul::fetch_ahead<0>(p); }
  NOMATMUL_INLINE static V four(const uint8_t* p) {
    int32_t word;
    std::memcpy(&word, p, sizeof word);
    return _mm256_set1_epi32(word);
  }
  NOMATMUL_INLINE static void add_lanes(int32_t* c, const Sum& sum) {
    auto* to = reinterpret_cast<__m256i*>(c);
    _mm256_storeu_si256(to, _mm256_add_epi32(_mm256_loadu_si256(to), widen(sum)));
  }

  static constexpr int kFewTokens = 4;
  template <Packing packing, int kTokens>
  __attribute__((noinline)) static void few(const Operands& op) {
    if constexpr (kTokens == 1) {
      if constexpr (packing == Packing::kTwoBit) {
        one_token<OneTokenTwoBit<2>, 2>(op);
      } else {
        one_token<OneTokenBase3<1>, 1>(op);
      }
    } else {
      Few<kTokens, kTokens == 2 ? 4 : 2>::template product<packing>(op);
    }
  }
};

}  // namespace

const TernaryKernels kAvx2Ternary = NOMATMUL_TERNARY(PlaneProducts<Avx2>);

}  // namespace nomatmul
