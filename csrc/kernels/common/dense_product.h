// The float32 and int8 products; dense_ops.h says what a file that includes it defines.
#pragma once

#include <algorithm>
#include <cstring>

#include "kernels/common/dense_vectors.h"
#include "kernels/common/unroll.h"

namespace nomatmul {
namespace {

// --- float32 product -------------------------------------------------------

constexpr int kRows = 6;  // rows at once: 12 sums, 2 of weights, 1 of inputs of 16 registers
constexpr int kWide = 2 * kLanes;     // outputs at once: a panel
constexpr int kDeep = 6144 / kLanes;  // inputs at once: 48 KiB of a panel
constexpr int kPace = 32;             // inputs between two prefetches
constexpr int kLine = 64;             // bytes
constexpr int kAheadBytes = 12288;    // shorter pieces of panels come from a near cache

// Weights that the next strips will read, and how many lines of them each pace prefetches.
struct Ahead {
  const char* from;
  int lines;
};

// c[kR][kWide] = or (kAdd) += x[kR][count] * panel[count][kWide].
template <int kR, bool kAdd>
void float_rows(const float* x, size_t ldx, int count, const float* panel, Ahead ahead, float* c,
                size_t ldc) {
  V acc[kR][2];
  unrolled<kR>([&](auto r) {
    acc[r][0] = kAdd ? load(c + r * ldc) : V{};
    acc[r][1] = kAdd ? load(c + r * ldc + kLanes) : V{};
  });
  // do: a loop that may never run would keep a second copy of the sums on the stack
  do {
    for (int line = 0; line < ahead.lines; ++line, ahead.from += kLine) {
      __builtin_prefetch(ahead.from);
    }
    const float* end = panel + static_cast<size_t>(std::min(kPace, count)) * kWide;
    count -= kPace;
    do {
      const V w0 = load(panel), w1 = load(panel + kLanes);
      unrolled<kR>([&](auto r) {
        const V value = splat(x[r * ldx]);
        acc[r][0] += value * w0;
        acc[r][1] += value * w1;
      });
      panel += kWide, ++x;
    } while (panel != end);
  } while (count > 0);
  unrolled<kR>([&](auto r) {
    store(c + r * ldc, acc[r][0]);
    store(c + r * ldc + kLanes, acc[r][1]);
  });
}

// The same for the first `columns` of a panel, and for 1 to kR rows.
template <bool kAdd, int kR = kRows>
inline void float_strip(int rows, const float* x, size_t ldx, int count, const float* panel,
                        Ahead ahead, int columns, float* c, size_t ldc) {
  if constexpr (kR >= 1) {
    if (rows < kR) {
      float_strip<kAdd, kR - 1>(rows, x, ldx, count, panel, ahead, columns, c, ldc);
    } else if (columns == kWide) {
      float_rows<kR, kAdd>(x, ldx, count, panel, ahead, c, ldc);
    } else {
      float edge[kR * kWide] = {};
      for (int r = 0; kAdd && r < kR; ++r)
        std::memcpy(edge + r * kWide, c + r * ldc, columns * sizeof(float));
      float_rows<kR, kAdd>(x, ldx, count, panel, ahead, edge, kWide);
      for (int r = 0; r < kR; ++r)
        std::memcpy(c + r * ldc, edge + r * kWide, columns * sizeof(float));
    }
  }
}

void float_product_all(const float* x, size_t ldx, int rows, int k, const float* panels, int p0,
                       int p1, int m, float* out, size_t ldo) {
  // Strips of nearly equal height: 128 rows are 18 of 6 and 4 of 5, not 21 of 6 and one of 2.
  const int strips = (rows + kRows - 1) / kRows;
  for (int p = p0; p < p1; ++p) {  // the outputs of one panel stay in the first cache
    const int at = p * kWide, columns = std::min(kWide, m - at);
    for (int from = 0; from < k; from += kDeep) {
      const int count = std::min(kDeep, k - from);
      const float* panel = panels + (static_cast<size_t>(p) * k + from) * kWide;
      // While this piece of a panel is multiplied, the one behind it is prefetched. Few strips
      // wait for it, so they leave it to the CPU.
      const int bytes = count * kWide * static_cast<int>(sizeof(float));
      const int paces = (count + kPace - 1) / kPace * strips;
      Ahead ahead{reinterpret_cast<const char*>(panel) + bytes, 0};
      if (strips >= 4 && bytes >= kAheadBytes) ahead.lines = (bytes / kLine + paces - 1) / paces;
      for (int strip = 0, t = 0; strip < strips; ++strip) {
        const int height = (rows - t + strips - strip - 1) / (strips - strip);
        const auto strip_of = from > 0 ? float_strip<true> : float_strip<false>;
        strip_of(height, x + t * ldx + from, ldx, count, panel, ahead, columns, out + t * ldo + at,
                 ldo);
        ahead.from += static_cast<size_t>(ahead.lines) * (paces / strips) * kLine;
        t += height;
      }
    }
  }
}

// --- int8 product ----------------------------------------------------------

inline void scale_store(Acc acc, const float* row_scale, float step, float* out, int count) {
  const V sums = floats_of(acc);
  if (count == kLanes) return store(out, sums * (load(row_scale) * step));
  for (int i = 0; i < count; ++i) out[i] = sums[i] * (row_scale[i] * step);
}

template <int kR>
inline void product_rows(const int16_t* q, size_t ldq, int pairs, const int8_t* panel, int columns,
                         const float* row_scale, const float* step, float* out, size_t ldo) {
  Acc acc[kR][2] = {};
  for (int i = 0; i < pairs; ++i) {
    const auto w0 = load_pairs(panel + static_cast<size_t>(i) * 2 * kWide);
    const auto w1 = load_pairs(panel + static_cast<size_t>(i) * 2 * kWide + kWide);
    for (int r = 0; r < kR; ++r) {
      int32_t pair;
      std::memcpy(&pair, q + r * ldq + 2 * i, sizeof pair);
      const auto x = broadcast_pair(pair);
      acc[r][0] = multiply_add(acc[r][0], x, w0);
      acc[r][1] = multiply_add(acc[r][1], x, w1);
    }
  }
  const int first = std::min(columns, kLanes), second = columns - first;
  for (int r = 0; r < kR; ++r) {
    scale_store(acc[r][0], row_scale, step[r], out + r * ldo, first);
    if (second > 0) {
      scale_store(acc[r][1], row_scale + kLanes, step[r], out + r * ldo + kLanes, second);
    }
  }
}

void product_all(const int16_t* q, size_t ldq, int rows, int k, const int8_t* panels, int p0,
                 int p1, int m, const float* row_scale, const float* step, float* out, size_t ldo) {
  const int pairs = (k + 1) / 2;
  for (int p = p0; p < p1; ++p) {
    const int8_t* panel = panels + static_cast<size_t>(p) * pairs * 2 * kWide;
    const int at = p * kWide, columns = std::min(kWide, m - at);
    int t = 0;
    for (; t + kProductRows <= rows; t += kProductRows) {
      product_rows<kProductRows>(q + t * ldq, ldq, pairs, panel, columns, row_scale + at, step + t,
                                 out + t * ldo + at, ldo);
    }
    for (; t < rows; ++t) {
      product_rows<1>(q + t * ldq, ldq, pairs, panel, columns, row_scale + at, step + t,
                      out + t * ldo + at, ldo);
    }
  }
}

}  // namespace
}  // namespace nomatmul
