// AVX-512 with VNNI: 64-byte vectors; u8 code x s8 activation summed by fours into int32 lanes by
// vpdpbusd, which neither saturates nor leaves int32 below kMaxElements elements.
// Shared by the AVX512-VNNI table and, for few tokens, the AMX one.
#pragma once

#include <cstdint>

#include "kernels/avx512vnni/intrinsics.h"
#include "kernels/common/product_entry.h"
#include "kernels/common/unroll.h"

namespace nomatmul {
namespace {

constexpr int kVec = 64;

// Ties a value to a register: without it GCC copies and spills accumulators, and loads an operand
// once for each use.
NOMATMUL_INLINE inline void tie(__m512i& v) {
#if defined(NOMATMUL_EMULATE)
  static_cast<void>(v);  // there a vector is no register
#else
  __asm__("" : "+v"(v));
#endif
}
NOMATMUL_INLINE inline void add_products(__m512i& sum, __m512i codes, __m512i q) {
  sum = _mm512_dpbusd_epi32(sum, codes, q);
  tie(sum);
}

inline __m512i load(const void* p) { return _mm512_loadu_si512(p); }
inline void store(void* p, __m512i v) { _mm512_storeu_si512(p, v); }

// Prefetches what lies kBytes further on, into the second level: the first has too few places for
// lines on their way (docs/log/cpu-decoder.md). A prefetch never faults, so that may be past the
// end of the weights; an integer, because a pointer may not point there.
template <int kBytes = 8192>
NOMATMUL_INLINE inline void fetch_ahead(const uint8_t* p) {
#if defined(NOMATMUL_EMULATE)
  static_cast<void>(p);
#else
  const uintptr_t at = reinterpret_cast<uintptr_t>(p) + kBytes;
  _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T1);
#endif
}

// Rows end at a multiple of 32 bytes, so a row's last vector may be half there. The other half
// reads as 0, and meets activations that are 0.
inline __m512i load_part(const uint8_t* p, size_t bytes) {
  if (bytes >= kVec) return load(p);
  return _mm512_maskz_loadu_epi8((uint64_t{1} << bytes) - 1, p);
}

// Sums of the lanes of four vectors.
inline __m128i fold4(__m512i a, __m512i b, __m512i c, __m512i d) {
  const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
  const __m512i all =
      _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  const __m256i half =
      _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
  return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

// rows[i] lane j becomes rows[j] lane i.
NOMATMUL_INLINE inline void transpose(__m512i (&rows)[16]) {
  __m512i pairs[16], fours[16], eights[16];
  unrolled<8>([&](auto i) NOMATMUL_INLINE {
    pairs[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
    pairs[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
  });
  unrolled<4>([&](auto i) NOMATMUL_INLINE {  // fours[4 i + j]: columns j, j + 4, j + 8, j + 12
    fours[4 * i] = _mm512_unpacklo_epi64(pairs[4 * i], pairs[4 * i + 2]);
    fours[4 * i + 1] = _mm512_unpackhi_epi64(pairs[4 * i], pairs[4 * i + 2]);
    fours[4 * i + 2] = _mm512_unpacklo_epi64(pairs[4 * i + 1], pairs[4 * i + 3]);
    fours[4 * i + 3] = _mm512_unpackhi_epi64(pairs[4 * i + 1], pairs[4 * i + 3]);
  });
  unrolled<4>([&](auto j) NOMATMUL_INLINE {                              // of rows 0..7 and 8..15
    eights[j] = _mm512_shuffle_i32x4(fours[j], fours[j + 4], 0x88);      // columns j, j + 8
    eights[j + 4] = _mm512_shuffle_i32x4(fours[j], fours[j + 4], 0xdd);  // j + 4, j + 12
    eights[j + 8] = _mm512_shuffle_i32x4(fours[j + 8], fours[j + 12], 0x88);
    eights[j + 12] = _mm512_shuffle_i32x4(fours[j + 8], fours[j + 12], 0xdd);
  });
  unrolled<8>([&](auto j) NOMATMUL_INLINE {
    rows[j] = _mm512_shuffle_i32x4(eights[j], eights[j + 8], 0x88);
    rows[j + 8] = _mm512_shuffle_i32x4(eights[j], eights[j + 8], 0xdd);
  });
}

NOMATMUL_INLINE inline __m512i tripled(__m512i x) {
  return _mm512_add_epi8(x, _mm512_add_epi8(x, x));
}

// What digits.h and product_entry.h ask for.
struct Vectors {
  static constexpr int kVec = nomatmul::kVec;
  using V = __m512i;
  using Sum = __m512i;

  static V load(const void* p) { return nomatmul::load(p); }
  NOMATMUL_INLINE static V load_packed(const uint8_t* p, size_t left) { return load_part(p, left); }
  NOMATMUL_INLINE static void fetch_ahead(const uint8_t* p) { nomatmul::fetch_ahead(p); }
  static void store(void* p, V v) { nomatmul::store(p, v); }
  NOMATMUL_INLINE static void tie(V& v) { nomatmul::tie(v); }

  template <int kPlane>
  NOMATMUL_INLINE static V two_bit(const V& packed) {
    return _mm512_and_si512(_mm512_srli_epi16(packed, 2 * kPlane), _mm512_set1_epi8(3));
  }
  // The byte is a fraction x / 256; its next digit is floor(3 x / 256), and 3 x mod 256 is left.
  // The digit is the top two bits of floor(3 x / 4), made by two averages; an average rounds up,
  // and taking 1 off first cancels that (checked for all 256 bytes by the parity tests).
  template <int kPlane>
  NOMATMUL_INLINE static V base3(V& fraction) {
    const V less = _mm512_subs_epu8(fraction, _mm512_set1_epi8(1));
    const V half = _mm512_avg_epu8(less, _mm512_setzero_si512());
    const V top = _mm512_srli_epi16(_mm512_avg_epu8(less, half), 6);
    if (kPlane < 4) fraction = tripled(fraction);
    return _mm512_and_si512(top, _mm512_set1_epi8(3));
  }
  NOMATMUL_INLINE static void add_product(Sum& sum, V codes, V q) { add_products(sum, codes, q); }
  static void fold(const Sum (&v)[4], int32_t* out) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), fold4(v[0], v[1], v[2], v[3]));
  }

  static constexpr int kFewTokens = 4;
  template <Packing packing, int kTokens>
  static void few(const Operands& op);
};

// --- one token: codes are never quite taken apart ---------------------------------------------

// Two bits: plane p is masked where it stands, so its sum is 4^p times too large; one sum a plane,
// and a shift at the end instead of one a vector. Plane 3's lane sum grows by at most
// 4 * 128 * 128 = 2^16 a block: kMaxElements / 256 blocks fit in int32.
template <int kRows>
struct OneTokenTwoBit {
  __m512i sums[kRows][4];

  NOMATMUL_INLINE void start() {
    unrolled<kRows>([&](auto r) NOMATMUL_INLINE {
      unrolled<4>([&](auto p) NOMATMUL_INLINE { sums[r][p] = _mm512_setzero_si512(); });
    });
  }
  template <class Load>
  NOMATMUL_INLINE void block(Load&& packed_row, const int8_t* q) {
    __m512i packed[kRows];
    unrolled<kRows>([&](auto r) NOMATMUL_INLINE { packed[r] = packed_row(r); });
    unrolled<4>([&](auto p) NOMATMUL_INLINE {
      const __m512i q_p = load(q + p * kVec);
      const __m512i mask = _mm512_set1_epi8(static_cast<char>(3 << (2 * p)));
      unrolled<kRows>([&](auto r) NOMATMUL_INLINE {
        add_products(sums[r][p], _mm512_and_si512(packed[r], mask), q_p);
      });
    });
  }
  NOMATMUL_INLINE __m512i total(int r) const {
    return _mm512_add_epi32(
        _mm512_add_epi32(sums[r][0], _mm512_srai_epi32(sums[r][1], 2)),
        _mm512_add_epi32(_mm512_srai_epi32(sums[r][2], 4), _mm512_srai_epi32(sums[r][3], 6)));
  }
};

// Base 3: with x_0 the byte and x_(p+1) = 3 x_p mod 256, digit p is (3 x_p - x_(p+1)) / 256. So
//   sum q_p d_p = (3 sum q_p x_p - sum q_p x_(p+1)) / 256, exactly, in each lane:
// two products a plane, and no digit is ever made. The sums may wrap; 256 times the result must
// not: |result| < 2^23 a lane, that is at most 1638 blocks between calls of drain().
template <int kRows>
struct OneTokenBase3 {
  static constexpr int kRun = 1024;
  __m512i now[kRows], next[kRows], done[kRows];

  NOMATMUL_INLINE void start() {
    unrolled<kRows>([&](auto r)
                        NOMATMUL_INLINE { now[r] = next[r] = done[r] = _mm512_setzero_si512(); });
  }
  template <class Load>
  NOMATMUL_INLINE void block(Load&& packed_row, const int8_t* q) {
    __m512i x[kRows];
    unrolled<kRows>([&](auto r) NOMATMUL_INLINE { x[r] = packed_row(r); });
    unrolled<5>([&](auto p) NOMATMUL_INLINE {
      const __m512i q_p = load(q + p * kVec);
      unrolled<kRows>([&](auto r) NOMATMUL_INLINE {
        add_products(now[r], x[r], q_p);
        x[r] = tripled(x[r]);
        add_products(next[r], x[r], q_p);
      });
    });
  }
  NOMATMUL_INLINE void drain() {
    unrolled<kRows>([&](auto r) NOMATMUL_INLINE {
      const __m512i triple = _mm512_add_epi32(now[r], _mm512_add_epi32(now[r], now[r]));
      const __m512i part = _mm512_srai_epi32(_mm512_sub_epi32(triple, next[r]), 8);
      done[r] = _mm512_add_epi32(done[r], part);
      now[r] = next[r] = _mm512_setzero_si512();
    });
  }
};

NOMATMUL_INLINE inline void write4(const Operands& op, int t, int n, int count, __m128i sums) {
  int32_t folded[4];
  _mm_storeu_si128(reinterpret_cast<__m128i*>(folded), sums);
  op.write(t, n, folded, count);
}

inline void one_token_two_bit(const Operands& op) {
  constexpr int kRows = 2;
  for (int n = op.n0; n < op.n1; n += 2 * kRows) {
    const int count = at_most(2 * kRows, op.n1 - n);
    __m512i totals[2 * kRows];
    unrolled<2>([&](auto pair) NOMATMUL_INLINE {
      const int first = at_most(pair * kRows, count - 1);
      const RowPointers<Vectors, kRows> rows(op, Packing::kTwoBit, n + first, count - first);
      OneTokenTwoBit<kRows> sums;
      sums.start();
      rows.blocks(0, op.layout.blocks, [&](auto load_row, int b) NOMATMUL_INLINE {
        sums.block(load_row, op.q + static_cast<size_t>(b) * 4 * kVec);
      });
      unrolled<kRows>([&](auto r) NOMATMUL_INLINE { totals[pair * kRows + r] = sums.total(r); });
    });
    write4(op, 0, n, count, fold4(totals[0], totals[1], totals[2], totals[3]));
  }
}

inline void one_token_base3(const Operands& op) {
  constexpr int kRows = 8;
  for (int n = op.n0; n < op.n1; n += kRows) {
    const int count = at_most(kRows, op.n1 - n);
    const RowPointers<Vectors, kRows> rows(op, Packing::kBase3, n, count);
    OneTokenBase3<kRows> sums;
    sums.start();
    for (int first = 0; first < op.layout.blocks; first += sums.kRun) {
      const int last = at_most(first + sums.kRun, op.layout.blocks);
      rows.blocks(first, last, [&](auto load_row, int b) NOMATMUL_INLINE {
        sums.block(load_row, op.q + static_cast<size_t>(b) * 5 * kVec);
      });
      sums.drain();
    }
    const __m512i* done = sums.done;
    write4(op, 0, n, at_most(4, count), fold4(done[0], done[1], done[2], done[3]));
    if (count > 4) {
      write4(op, 0, n + 4, count - 4, fold4(done[4], done[5], done[6], done[7]));
    }
  }
}

template <Packing packing, int kTokens>
void Vectors::few(const Operands& op) {
  if constexpr (kTokens > 1) {
    few_tokens<Vectors, packing, kTokens>(op);
  } else if constexpr (packing == Packing::kTwoBit) {
    one_token_two_bit(op);
  } else {
    one_token_base3(op);
  }
}

}  // namespace
}  // namespace nomatmul
