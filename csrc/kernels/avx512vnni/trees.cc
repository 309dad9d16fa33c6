// AVX-512 with VNNI: 16 floats; int8 x int16 through vpdpwssd; ternary codes x int8 through
// vpdpbusd, masked where they stand (vectors.h).
#include "kernels/avx512vnni/vectors.h"
#include "kernels/common/trees_ops.h"

namespace nomatmul {
namespace {

inline int32_t sum_of_lanes(__m512i v) {
  int32_t lanes[4];
  const __m512i zero = _mm512_setzero_si512();
  _mm_storeu_si128(reinterpret_cast<__m128i*>(lanes), fold4(v, zero, zero, zero));
  return lanes[0];
}

// Columns of outputs that are summed together: the bytes of one vector of packed rows.
constexpr int kBlockColumns = 4 * kVec;

// sums[group][plane]: lane 4 * l + i is packed byte 16 * l + 4 * group + i, 4^plane times too
// large. To the order of the columns.
inline void spread(const __m512i (&sums)[4][4], int32_t* columns) {
  unrolled<4>([&](auto group) NOMATMUL_INLINE {
    const __m512i p0 = sums[group][0], p1 = _mm512_srai_epi32(sums[group][1], 2);
    const __m512i p2 = _mm512_srai_epi32(sums[group][2], 4);
    const __m512i p3 = _mm512_srai_epi32(sums[group][3], 6);
    const __m512i low01 = _mm512_unpacklo_epi32(p0, p1), low23 = _mm512_unpacklo_epi32(p2, p3);
    const __m512i high01 = _mm512_unpackhi_epi32(p0, p1), high23 = _mm512_unpackhi_epi32(p2, p3);
    const __m512i byte0 = _mm512_unpacklo_epi64(low01, low23);  // four columns of byte 0 a lane
    const __m512i byte1 = _mm512_unpackhi_epi64(low01, low23);
    const __m512i byte2 = _mm512_unpacklo_epi64(high01, high23);
    const __m512i byte3 = _mm512_unpackhi_epi64(high01, high23);
    const __m512i a = _mm512_shuffle_i32x4(byte0, byte1, 0x44);  // lanes 0, 1 of both
    const __m512i b = _mm512_shuffle_i32x4(byte2, byte3, 0x44);
    const __m512i c = _mm512_shuffle_i32x4(byte0, byte1, 0xee);  // lanes 2, 3
    const __m512i d = _mm512_shuffle_i32x4(byte2, byte3, 0xee);
    store(columns + 16 * group, _mm512_shuffle_i32x4(a, b, 0x88));
    store(columns + 16 * group + 64, _mm512_shuffle_i32x4(a, b, 0xdd));
    store(columns + 16 * group + 128, _mm512_shuffle_i32x4(c, d, 0x88));
    store(columns + 16 * group + 192, _mm512_shuffle_i32x4(c, d, 0xdd));
  });
}

struct PlainFloats {
  NOMATMUL_PLAIN_FLOATS(16)
};

struct Avx512 : PlainFloats, OneByOne<Avx512>, TernaryPlanes<kVec> {
  using PlainFloats::load;
#if !defined(NOMATMUL_EMULATE)  // there an intrinsic's vector is not the compiler's
  static F load(const uint16_t* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return reinterpret_cast<F>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  static F load(const int8_t* p) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return reinterpret_cast<F>(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)));
  }
#endif

  static int32_t dot_int8(const int8_t* row, const int16_t* x, int k) {
    __m512i sums[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
    const auto block = [&](const int8_t* w, const int16_t* v) NOMATMUL_INLINE {
      unrolled<2>([&](auto i) NOMATMUL_INLINE {
        const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + 32 * i));
        sums[i] =
            _mm512_dpwssd_epi32(sums[i], _mm512_cvtepi8_epi16(bytes), nomatmul::load(v + 32 * i));
      });
    };
    int e = 0;
    for (; e + kSumLanes <= k; e += kSumLanes) block(row + e, x + e);
    if (e < k) {
      int8_t last[kSumLanes] = {};
      std::memcpy(last, row + e, static_cast<size_t>(k - e));
      block(last, x + e);
    }
    return sum_of_lanes(_mm512_add_epi32(sums[0], sums[1]));
  }

  static int32_t dot_ternary(const uint8_t* row, const int8_t* q, int k) {
    const size_t bytes = row_bytes_of(Packing::kTwoBit, k);
    OneTokenTwoBit<1> sums;
    sums.start();
    for (size_t at = 0; at < bytes; at += kVec) {
      sums.block([&](auto) NOMATMUL_INLINE { return load_part(row + at, bytes - at); }, q + 4 * at);
    }
    return sum_of_lanes(sums.total(0));
  }

  // Four rows' bytes are interleaved, so that one vpdpbusd adds four rows' codes times their q.
  static void combine_ternary(const FffTree& tree, const int32_t* rows, const int8_t* q, int count,
                              float scale, float* y, int from, int to, const int32_t*) {
    const int32_t total = sum_of(q, count);
    for (int c = from; c < to; c += kBlockColumns) {
      const uint8_t* out = tree.out + c / 4;
      const size_t bytes = tree.side_bytes - static_cast<size_t>(c) / 4;
      __m512i sums[4][4];
      unrolled<4>([&](auto group) NOMATMUL_INLINE {
        unrolled<4>([&](auto p) NOMATMUL_INLINE { sums[group][p] = _mm512_setzero_si512(); });
      });
      for (int r = 0; r < count; r += 4) {
        __m512i row[4];
        int8_t quads[4] = {};  // beyond the last row that row once more, times 0
        unrolled<4>([&](auto i) NOMATMUL_INLINE {
          const bool there = r + i < count;
          const size_t at = static_cast<size_t>(rows[there ? r + i : r]) * tree.stride;
          row[i] = load_part(out + at, bytes);
          if (there) quads[i] = q[r + i];
        });
        int32_t word;
        std::memcpy(&word, quads, sizeof word);
        const __m512i four = _mm512_set1_epi32(word);
        const __m512i low01 = _mm512_unpacklo_epi8(row[0], row[1]);
        const __m512i low23 = _mm512_unpacklo_epi8(row[2], row[3]);
        const __m512i high01 = _mm512_unpackhi_epi8(row[0], row[1]);
        const __m512i high23 = _mm512_unpackhi_epi8(row[2], row[3]);
        const __m512i mixed[4] = {
            _mm512_unpacklo_epi16(low01, low23), _mm512_unpackhi_epi16(low01, low23),
            _mm512_unpacklo_epi16(high01, high23), _mm512_unpackhi_epi16(high01, high23)};
        unrolled<4>([&](auto p) NOMATMUL_INLINE {
          const __m512i mask = _mm512_set1_epi8(static_cast<char>(3 << (2 * p)));
          unrolled<4>([&](auto group) NOMATMUL_INLINE {
            add_products(sums[group][p], _mm512_and_si512(mixed[group], mask), four);
          });
        });
      }
      alignas(64) int32_t columns[kBlockColumns];
      spread(sums, columns);
      const int there = at_most(kBlockColumns, to - c);
      for (int j = 0; j < there; ++j) y[c + j] = static_cast<float>(columns[j] - total) * scale;
    }
  }
};

}  // namespace

const TreeKernels kAvx512VnniTrees = NOMATMUL_TREES(Avx512);

}  // namespace nomatmul
