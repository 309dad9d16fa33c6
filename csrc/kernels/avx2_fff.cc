// AVX2: 8 floats; int8 x int16 through vpmaddwd; ternary codes x int8 through vpmaddubsw.
#include <immintrin.h>

#include "fff_ops.h"

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
// A pair of rows adds at most 2 * 2 * 128 to an int16 lane.
constexpr int kMaxRun = 2 * 63;
// Blocks between widenings of a logit's sums.
constexpr int kDotRun = 7;

// sums[plane][half] of int16, half 0: packed bytes 0-7 and 16-23, half 1: 8-15 and 24-31; added to
// sums32 in the order of the columns.
inline void spread(const __m256i (&sums)[4][2], int32_t* sums32) {
  const auto add8 = [](int32_t* to, __m128i v) {
    store(to, _mm256_add_epi32(load(to), _mm256_cvtepi16_epi32(v)));
  };
  for (int half = 0; half < 2; ++half) {
    const __m256i low01 = _mm256_unpacklo_epi16(sums[0][half], sums[1][half]);
    const __m256i low23 = _mm256_unpacklo_epi16(sums[2][half], sums[3][half]);
    const __m256i high01 = _mm256_unpackhi_epi16(sums[0][half], sums[1][half]);
    const __m256i high23 = _mm256_unpackhi_epi16(sums[2][half], sums[3][half]);
    const __m256i parts[4] = {
        _mm256_unpacklo_epi32(low01, low23), _mm256_unpackhi_epi32(low01, low23),
        _mm256_unpacklo_epi32(high01, high23), _mm256_unpackhi_epi32(high01, high23)};
    for (int part = 0; part < 4; ++part) {
      int32_t* to = sums32 + 32 * half + 8 * part;
      add8(to, _mm256_castsi256_si128(parts[part]));
      add8(to + 64, _mm256_extracti128_si256(parts[part], 1));
    }
  }
}

struct Avx2 {
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

  static int32_t dot_int8(const int8_t* row, const int16_t* x, int k) {
    __m256i sums[4];
    unrolled<4>([&](auto i) NOMATMUL_INLINE { sums[i] = _mm256_setzero_si256(); });
    const auto block = [&](const int8_t* w, const int16_t* v) NOMATMUL_INLINE {
      unrolled<4>([&](auto i) NOMATMUL_INLINE {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(w + 16 * i));
        const __m256i products =
            _mm256_madd_epi16(_mm256_cvtepi8_epi16(bytes), nomatmul::load(v + 16 * i));
        sums[i] = _mm256_add_epi32(sums[i], products);
      });
    };
    int e = 0;
    for (; e + kSumLanes <= k; e += kSumLanes) block(row + e, x + e);
    if (e < k) {
      int8_t last[kSumLanes] = {};
      std::memcpy(last, row + e, static_cast<size_t>(k - e));
      block(last, x + e);
    }
    return sum_of_lanes(
        _mm256_add_epi32(_mm256_add_epi32(sums[0], sums[1]), _mm256_add_epi32(sums[2], sums[3])));
  }

  static size_t ternary_bytes(int k) {
    return PlaneLayout(Packing::kTwoBit, kVec, 1, k).bytes_per_token;
  }
  static void ternary_prepare(const int8_t* q, int k, int8_t* prepared) {
    split_row<kVec, 4>(q, k, prepared);
  }

  // Planes 1 and 3 are masked where they stand, so their sum is 4 times too large: in each block it
  // adds at most 2 * 2 * 8 * 128 = 2^12 to an int16 lane, and 7 blocks fit.
  static int32_t dot_ternary(const uint8_t* row, const int8_t* q, int k) {
    const int blocks = PlaneLayout(Packing::kTwoBit, kVec, 1, k).blocks;
    const __m256i low = _mm256_set1_epi8(3), high = _mm256_set1_epi8(12);
    const auto products = [](__m256i codes, const int8_t* v) NOMATMUL_INLINE {
      return _mm256_maddubs_epi16(codes, nomatmul::load(v));
    };
    __m256i once = _mm256_setzero_si256(), fourfold = _mm256_setzero_si256();
    for (int first = 0; first < blocks; first += kDotRun) {
      __m256i even = _mm256_setzero_si256(), odd = _mm256_setzero_si256();
      const int last = at_most(first + kDotRun, blocks);
      for (int b = first; b < last; ++b, row += kVec, q += 4 * kVec) {
        const __m256i packed = nomatmul::load(row), upper = _mm256_srli_epi16(packed, 4);
        const __m256i p0 = products(_mm256_and_si256(packed, low), q);
        const __m256i p1 = products(_mm256_and_si256(packed, high), q + kVec);
        const __m256i p2 = products(_mm256_and_si256(upper, low), q + 2 * kVec);
        const __m256i p3 = products(_mm256_and_si256(upper, high), q + 3 * kVec);
        even = _mm256_add_epi16(even, _mm256_add_epi16(p0, p2));
        odd = _mm256_add_epi16(odd, _mm256_add_epi16(p1, p3));
      }
      once = _mm256_add_epi32(once, widened_pairs(even));
      fourfold = _mm256_add_epi32(fourfold, widened_pairs(odd));
    }
    return sum_of_lanes(_mm256_add_epi32(once, _mm256_srai_epi32(fourfold, 2)));
  }

  // Two rows' bytes are interleaved, so that one vpmaddubsw adds both rows' codes times their q.
  static void combine_ternary(const FffTree& tree, const int32_t* rows, const int8_t* q, int count,
                              float scale, float* y, int from, int to) {
    const int32_t total = sum_of(q, count);
    const __m256i three = _mm256_set1_epi8(3);
    for (int c = from; c < to; c += kBlockColumns) {
      alignas(32) int32_t sums32[kBlockColumns] = {};
      const uint8_t* out = tree.out + c / 4;
      for (int first = 0; first < count; first += kMaxRun) {
        const int last = at_most(first + kMaxRun, count);
        __m256i sums[4][2];
        unrolled<4>([&](auto p)
                        NOMATMUL_INLINE { sums[p][0] = sums[p][1] = _mm256_setzero_si256(); });
        for (int r = first; r < last; r += 2) {
          const bool pair = r + 1 < last;  // else the row once more, times 0
          const __m256i a = nomatmul::load(out + static_cast<size_t>(rows[r]) * tree.stride);
          const __m256i b =
              nomatmul::load(out + static_cast<size_t>(rows[pair ? r + 1 : r]) * tree.stride);
          const int other = pair ? q[r + 1] : 0;
          const __m256i both =
              _mm256_set1_epi16(static_cast<int16_t>(static_cast<uint8_t>(q[r]) | other * 256));
          const __m256i low = _mm256_unpacklo_epi8(a, b), high = _mm256_unpackhi_epi8(a, b);
          unrolled<4>([&](auto p) NOMATMUL_INLINE {
            const __m256i code0 = _mm256_and_si256(_mm256_srli_epi16(low, 2 * p), three);
            const __m256i code1 = _mm256_and_si256(_mm256_srli_epi16(high, 2 * p), three);
            sums[p][0] = _mm256_add_epi16(sums[p][0], _mm256_maddubs_epi16(code0, both));
            sums[p][1] = _mm256_add_epi16(sums[p][1], _mm256_maddubs_epi16(code1, both));
          });
        }
        spread(sums, sums32);
      }
      const int there = at_most(kBlockColumns, to - c);
      for (int j = 0; j < there; ++j) y[c + j] = static_cast<float>(sums32[j] - total) * scale;
    }
  }
};

}  // namespace

const FffKernels kAvx2Fff = NOMATMUL_FFF(Avx2);

}  // namespace nomatmul
