// AVX2: 8 floats; int8 x int8, and ternary codes x int8, through vpmaddubsw.
#include <immintrin.h>

#include "kernels/common/trees_ops.h"

namespace nomatmul {
namespace {

constexpr int kVec = 32;

inline __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void store(void* p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
inline int32_t sum_of_lanes(__m256i v) {
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}
inline __m256i widened_pairs(__m256i sums16) {
  return _mm256_madd_epi16(sums16, _mm256_set1_epi16(1));
}

// Columns of outputs that are summed together: the bytes of one vector of packed rows.
constexpr int kBlockColumns = 4 * kVec;
// Planes 1 and 3 are masked where they stand, 4 times too large: a pair of rows adds -2 * 8 * 128
// to 2 * 8 * 127 to an int16 lane, and 16 pairs fit. Of what is not too large 64 pairs fit.
constexpr int kMaxRun = 2 * 16;
constexpr int kMaxWhole = 2 * 64;
// Blocks between widenings of a logit's sums.
constexpr int kDotRun = 7;

// sum += v, tied to one register: GCC otherwise copies and spills accumulators.
NOMATMUL_INLINE inline void add_words(__m256i& sum, __m256i v) {
  __asm__("vpaddw %1, %0, %0" : "+x"(sum) : "x"(v));
}

// int16 sums of 128 columns, [plane][half]; half 0: packed bytes 0-7 and 16-23, half 1: 8-15 and
// 24-31. visit(column, 8 sums of int16) for each eight columns.
template <class Visit>
NOMATMUL_INLINE inline void in_order(const __m256i (&sums)[4][2], Visit&& visit) {
  unrolled<2>([&](auto half) NOMATMUL_INLINE {
    const __m256i low01 = _mm256_unpacklo_epi16(sums[0][half], sums[1][half]);
    const __m256i low23 = _mm256_unpacklo_epi16(sums[2][half], sums[3][half]);
    const __m256i high01 = _mm256_unpackhi_epi16(sums[0][half], sums[1][half]);
    const __m256i high23 = _mm256_unpackhi_epi16(sums[2][half], sums[3][half]);
    const __m256i parts[4] = {
        _mm256_unpacklo_epi32(low01, low23), _mm256_unpackhi_epi32(low01, low23),
        _mm256_unpacklo_epi32(high01, high23), _mm256_unpackhi_epi32(high01, high23)};
    unrolled<4>([&](auto part) NOMATMUL_INLINE {
      visit(32 * half + 8 * part, _mm256_castsi256_si128(parts[part]));
      visit(32 * half + 8 * part + 64, _mm256_extracti128_si256(parts[part], 1));
    });
  });
}

// Adds 128 columns of up to kMaxRun rows to sums. at: the columns' bytes in row 0; ahead: bytes
// from there to what is prefetched of each row, where kFetch.
template <bool kFetch>
NOMATMUL_INLINE inline void add_run(const uint8_t* at, size_t stride, size_t ahead,
                                    const int32_t* rows, const int8_t* q, int count,
                                    __m256i (&sums)[4][2]) {
  const __m256i low_codes = _mm256_set1_epi8(3), high_codes = _mm256_set1_epi8(12);
  __m256i s[4][2];
  unrolled<4>([&](auto p) NOMATMUL_INLINE { s[p][0] = s[p][1] = _mm256_setzero_si256(); });
  const auto add_pair = [&](const uint8_t* row_a, const uint8_t* row_b,
                            __m256i both) NOMATMUL_INLINE {
    const __m256i a = load(row_a), b = load(row_b);
    if (kFetch) {
      fetch_line(row_a + ahead);
      fetch_line(row_b + ahead);
    }
    __m256i mixed[2] = {_mm256_unpacklo_epi8(a, b), _mm256_unpackhi_epi8(a, b)};
    const auto add = [&](auto p, auto half, __m256i codes) NOMATMUL_INLINE {
      add_words(s[p][half], _mm256_maddubs_epi16(codes, both));
    };
    unrolled<2>([&](auto half) NOMATMUL_INLINE {
      constexpr std::integral_constant<int, 0> p0;
      constexpr std::integral_constant<int, 1> p1;
      constexpr std::integral_constant<int, 2> p2;
      constexpr std::integral_constant<int, 3> p3;
      add(p0, half, _mm256_and_si256(mixed[half], low_codes));
      add(p1, half, _mm256_and_si256(mixed[half], high_codes));
      const __m256i upper = _mm256_srli_epi16(mixed[half], 4);
      add(p2, half, _mm256_and_si256(upper, low_codes));
      add(p3, half, _mm256_and_si256(upper, high_codes));
    });
  };
  int r = 0;
  for (; r + 2 <= count; r += 2) {
    int16_t both;
    std::memcpy(&both, q + r, sizeof both);
    add_pair(at + static_cast<size_t>(rows[r]) * stride,
             at + static_cast<size_t>(rows[r + 1]) * stride, _mm256_set1_epi16(both));
  }
  if (r < count) {  // the row once more, times 0
    const uint8_t* row = at + static_cast<size_t>(rows[r]) * stride;
    add_pair(row, row, _mm256_set1_epi16(static_cast<uint8_t>(q[r])));
  }
  unrolled<2>([&](auto half) NOMATMUL_INLINE {
    unrolled<4>([&](auto p) NOMATMUL_INLINE {
      const __m256i sum = p % 2 == 0 ? s[p][half] : _mm256_srai_epi16(s[p][half], 2);
      sums[p][half] = _mm256_add_epi16(sums[p][half], sum);
    });
  });
}

// Lane sums of code * q, of one row and some tokens. Planes 1 and 3 are masked where they stand, so
// their sum is 4 times too large: in each block it adds at most 2 * 2 * 8 * 127 < 2^12 to an int16
// lane, and 7 blocks fit.
template <int kTokens>
NOMATMUL_INLINE inline void ternary_sums(const uint8_t* row, const int8_t* const* q, int k,
                                         __m256i* sums) {
  const int blocks = PlaneLayout(Packing::kTwoBit, kVec, 1, k).blocks;
  const __m256i low = _mm256_set1_epi8(3), high = _mm256_set1_epi8(12);
  __m256i once[kTokens], fourfold[kTokens];
  unrolled<kTokens>([&](auto t)
                        NOMATMUL_INLINE { once[t] = fourfold[t] = _mm256_setzero_si256(); });
  size_t at = 0;
  for (int first = 0; first < blocks; first += kDotRun) {
    __m256i even[kTokens], odd[kTokens];
    unrolled<kTokens>([&](auto t) NOMATMUL_INLINE { even[t] = odd[t] = _mm256_setzero_si256(); });
    const size_t end = static_cast<size_t>(at_most(first + kDotRun, blocks)) * kVec;
    for (; at < end; at += kVec) {
      const __m256i packed = load(row + at), upper = _mm256_srli_epi16(packed, 4);
      const __m256i c0 = _mm256_and_si256(packed, low), c1 = _mm256_and_si256(packed, high);
      const __m256i c2 = _mm256_and_si256(upper, low), c3 = _mm256_and_si256(upper, high);
      unrolled<kTokens>([&](auto t) NOMATMUL_INLINE {
        const int8_t* v = q[t] + 4 * at;
        add_words(even[t], _mm256_maddubs_epi16(c0, load(v)));
        add_words(odd[t], _mm256_maddubs_epi16(c1, load(v + kVec)));
        add_words(even[t], _mm256_maddubs_epi16(c2, load(v + 2 * kVec)));
        add_words(odd[t], _mm256_maddubs_epi16(c3, load(v + 3 * kVec)));
      });
    }
    unrolled<kTokens>([&](auto t) NOMATMUL_INLINE {
      once[t] = _mm256_add_epi32(once[t], widened_pairs(even[t]));
      fourfold[t] = _mm256_add_epi32(fourfold[t], widened_pairs(odd[t]));
    });
  }
  unrolled<kTokens>([&](auto t) NOMATMUL_INLINE {
    sums[t] = _mm256_add_epi32(once[t], _mm256_srai_epi32(fourfold[t], 2));
  });
}

// Lane sums of int8 rows times x, see dot_int8().
NOMATMUL_INLINE inline __m256i int8_sums(const int8_t* row, const int8_t* x, int k) {
  __m256i sums[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
  const auto block = [&](const int8_t* p, const int8_t* v) NOMATMUL_INLINE {
    unrolled<2>([&](auto i) NOMATMUL_INLINE {
      const __m256i w = load(p + kVec * i);
      const __m256i products =
          _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(load(v + kVec * i), w));
      sums[i] = _mm256_add_epi32(sums[i], widened_pairs(products));
    });
  };
  int e = 0;
  for (; e + kSumLanes <= k; e += kSumLanes) block(row + e, x + e);
  if (e < k) {
    int8_t last[kSumLanes] = {};
    std::memcpy(last, row + e, static_cast<size_t>(k - e));
    block(last, x + e);
  }
  return _mm256_add_epi32(sums[0], sums[1]);
}

// The lane sums of four vectors.
NOMATMUL_INLINE inline void store4(int32_t* out, const __m256i (&v)[kFour]) {
  const __m256i ab = _mm256_hadd_epi32(v[0], v[1]), cd = _mm256_hadd_epi32(v[2], v[3]);
  const __m256i all = _mm256_hadd_epi32(ab, cd);
  const __m128i sums = _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), sums);
}

struct Avx2 : TernaryPlanes<kVec> {
  static constexpr int kWidth = 8;
  using F = float __attribute__((vector_size(32)));
  static F load(const float* p) { return load_as<F>(p); }
  static F load(const uint16_t* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return reinterpret_cast<F>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  static F load(const int8_t* p) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    return reinterpret_cast<F>(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)));
  }

  // |w| as unsigned times x with w's sign: a pair adds at most 2 * 128 * 127 to an int16 lane.
  // x is never -128 (quantise() divides by the largest), so its sign can be flipped.
  using Q = int8_t;
  static int32_t dot_int8(const int8_t* row, const int8_t* x, int k) {
    return sum_of_lanes(int8_sums(row, x, k));
  }

  static int32_t dot_ternary(const uint8_t* row, const int8_t* q, int k) {
    __m256i sums;
    ternary_sums<1>(row, &q, k, &sums);
    return sum_of_lanes(sums);
  }
  static void four_ternary(const uint8_t* const (&rows)[kFour], const int8_t* const (&x)[kFour],
                           int k, int32_t* out) {
    __m256i sums[kFour];
    if (rows[0] == rows[1] && rows[0] == rows[2] && rows[0] == rows[3]) {  // a root, mostly
      ternary_sums<kFour>(rows[0], x, k, sums);
    } else {
      unrolled<kFour>([&](auto i)
                          NOMATMUL_INLINE { ternary_sums<1>(rows[i], x + i, k, sums + i); });
    }
    store4(out, sums);
  }
  static void four_int8(const int8_t* const (&rows)[kFour], const int8_t* const (&x)[kFour], int k,
                        int32_t* out) {
    __m256i sums[kFour];
    unrolled<kFour>([&](auto i) NOMATMUL_INLINE { sums[i] = int8_sums(rows[i], x[i], k); });
    store4(out, sums);
  }

  // Two rows' bytes are interleaved, so that one vpmaddubsw adds both rows' codes times their q.
  static void combine_ternary(const FffTree& tree, const int32_t* rows, const int8_t* q, int count,
                              float scale, float* y, int from, int to, const int32_t* next) {
    const __m256i total = _mm256_set1_epi32(sum_of(q, count));
    const __m256 factor = _mm256_set1_ps(scale);
    const auto finished = [&](__m256i sum) NOMATMUL_INLINE {
      return _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_sub_epi32(sum, total)), factor);
    };
    for (int c = from; c < to; c += kBlockColumns) {
      const uint8_t* at = tree.out + c / 4;
      // Every second block prefetches the next line of the rows, the last ones that of the next
      // rows.
      const bool fetching = c / kBlockColumns % 2 == 0;
      if (next != nullptr && c + kBlockColumns >= to) prefetch_first(tree, next, count);
      alignas(32) float out[kBlockColumns];
      float* to_y = c + kBlockColumns <= to ? y + c : out;
      alignas(32) int32_t sums32[kBlockColumns];
      const bool single = count <= kMaxWhole;
      if (!single) std::memset(sums32, 0, sizeof sums32);
      for (int first = 0; first < count; first += kMaxWhole) {
        const int last = at_most(first + kMaxWhole, count);
        __m256i sums[4][2];
        unrolled<4>([&](auto p)
                        NOMATMUL_INLINE { sums[p][0] = sums[p][1] = _mm256_setzero_si256(); });
        for (int r = first; r < last; r += kMaxRun) {
          const int run = at_most(kMaxRun, last - r);
          if (fetching) {
            add_run<true>(at, tree.stride, 64, rows + r, q + r, run, sums);
          } else {
            add_run<false>(at, tree.stride, 0, rows + r, q + r, run, sums);
          }
        }
        if (single) {
          in_order(sums, [&](int column, __m128i v) NOMATMUL_INLINE {
            _mm256_storeu_ps(to_y + column, finished(_mm256_cvtepi16_epi32(v)));
          });
        } else {
          in_order(sums, [&](int column, __m128i v) NOMATMUL_INLINE {
            store(sums32 + column,
                  _mm256_add_epi32(nomatmul::load(sums32 + column), _mm256_cvtepi16_epi32(v)));
          });
        }
      }
      if (!single) {
        for (int j = 0; j < kBlockColumns; j += 8) {
          _mm256_storeu_ps(to_y + j, finished(nomatmul::load(sums32 + j)));
        }
      }
      if (to_y == out) std::memcpy(y + c, out, static_cast<size_t>(to - c) * sizeof(float));
    }
  }

  static void prefetch_first(const FffTree& tree, const int32_t* rows, int count) {
    for (int r = 0; r < count; ++r) {
      fetch_line(tree.out + static_cast<size_t>(rows[r]) * tree.stride);
    }
  }
};

}  // namespace

const TreeKernels kAvx2Trees = NOMATMUL_TREES(Avx2);

}  // namespace nomatmul
