// One head of one sequence: both products are those of dense_product.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/common/dense_product.h"

namespace nomatmul {
namespace {

constexpr int kQueries = 4 * kRows;  // at once

inline int round_up(int n, int step) { return (n + step - 1) / step * step; }

// s = exp(s - max) over n scores (a multiple of kLanes); returns 1 / sum. hidden, or nullptr: to be
// added before, -inf for keys that nobody sees.
inline float softmax_numerators(float* s, int n, const float* hidden) {
  if (hidden != nullptr) {
    for (int i = 0; i < n; i += kLanes) store(s + i, load(s + i) + load(hidden + i));
  }
  V top = load(s);
  for (int i = kLanes; i < n; i += kLanes) top = larger(load(s + i), top);
  const V peak = splat(largest(top));
  V total = {};
  for (int i = 0; i < n; i += kLanes) {
    const V p = exp_of(load(s + i) - peak);
    store(s + i, p);
    total += p;
  }
  return 1.0f / sum(total);
}

size_t attention_floats(int t, int e) {
  const size_t tp = round_up(t, kWide), ep = round_up(e, kWide);
  return e * tp + t * ep + tp + kQueries * (tp + e);
}

// a0 b0 a1 b1 ...: of the lower halves, of the upper halves.
#if NOMATMUL_LANES == 4
#define NOMATMUL_LOWER 0, 4, 1, 5
#define NOMATMUL_UPPER 2, 6, 3, 7
#elif NOMATMUL_LANES == 8
#define NOMATMUL_LOWER 0, 8, 1, 9, 2, 10, 3, 11
#define NOMATMUL_UPPER 4, 12, 5, 13, 6, 14, 7, 15
#else
#define NOMATMUL_LOWER 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define NOMATMUL_UPPER 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#endif
#if defined(__clang__)
inline V lower(V a, V b) { return __builtin_shufflevector(a, b, NOMATMUL_LOWER); }
inline V upper(V a, V b) { return __builtin_shufflevector(a, b, NOMATMUL_UPPER); }
#else
inline V lower(V a, V b) { return __builtin_shuffle(a, b, VI{NOMATMUL_LOWER}); }
inline V upper(V a, V b) { return __builtin_shuffle(a, b, VI{NOMATMUL_UPPER}); }
#endif

// to[i * ldt + j] = from[j * ldf + i] of a square of kLanes: each step shuffles the rows together
// with those half a square below, as cards are.
inline void transpose(const float* from, size_t ldf, float* to, size_t ldt) {
  constexpr int kHalf = kLanes / 2;
  V rows[kLanes], next[kLanes];
  unrolled<kLanes>([&](auto j) { rows[j] = load(from + j * ldf); });
  for (int step = 1; step < kLanes; step *= 2) {
    unrolled<kHalf>([&](auto j) {
      next[2 * j] = lower(rows[j], rows[j + kHalf]);
      next[2 * j + 1] = upper(rows[j], rows[j + kHalf]);
    });
    unrolled<kLanes>([&](auto j) { rows[j] = next[j]; });
  }
  unrolled<kLanes>([&](auto j) { store(to + j * ldt, rows[j]); });
}

// Keys as panels of float_product, [tp / kWide][e][kWide], zero behind the last token.
inline void key_panels(const float* k, size_t ld, int t, int e, float* keys) {
  for (int s = 0; s < round_up(t, kWide);
       s += kLanes) {  // few rows at a time: they lie pages apart
    float* panel = keys + static_cast<size_t>(s / kWide * kWide) * e + s % kWide;
    const int count = std::clamp(t - s, 0, kLanes);
    int i = 0;
    for (; count == kLanes && i + kLanes <= e; i += kLanes) {
      transpose(k + s * ld + i, ld, panel + static_cast<size_t>(i) * kWide, kWide);
    }
    for (; i < e; ++i) {
      float* to = panel + static_cast<size_t>(i) * kWide;
      for (int j = 0; j < kLanes; ++j) to[j] = j < count ? k[(s + j) * ld + i] : 0.0f;
    }
  }
}

// Values as panels, [ep / kWide][t][kWide], zero behind the last column.
inline void value_panels(const float* v, size_t ld, int t, int e, float* values) {
  for (int i = 0; i < e; i += kWide, values += static_cast<size_t>(t) * kWide) {
    const int count = std::min(kWide, e - i);
    for (int s = 0; s < t; ++s) {
      const float* from = v + s * ld + i;
      float* to = values + static_cast<size_t>(s) * kWide;
      if (count == kWide) {
        store(to, load(from));
        store(to + kLanes, load(from + kLanes));
      } else {
        for (int j = 0; j < kWide; ++j) to[j] = j < count ? from[j] : 0.0f;
      }
    }
  }
}

// to[count] = from * factor
inline void scaled(const float* from, float factor, int count, float* to) {
  int i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i) * factor);
  for (; i < count; ++i) to[i] = from[i] * factor;
}

void attention_head(const float* q, const float* k, const float* v, size_t ld, const uint8_t* seen,
                    int t, int e, float* scratch, float* out, size_t ldo) {
  const int tp = round_up(t, kWide), ep = round_up(e, kWide);
  float* keys = scratch;
  float* values = keys + static_cast<size_t>(e) * tp;
  float* hidden = values + static_cast<size_t>(t) * ep;  // [tp]: 0, or -inf for a hidden key
  float* scores = hidden + tp;                           // [kQueries][tp]
  float* queries = scores + static_cast<size_t>(kQueries) * tp;
  key_panels(k, ld, t, e, keys);
  value_panels(v, ld, t, e, values);
  bool all = true;
  for (int s = 0; s < tp; ++s) {
    const bool open = s < t && (seen == nullptr || seen[s] != 0);
    hidden[s] = open ? 0 : -std::numeric_limits<float>::infinity();
    all = all && open;
  }
  const float scale = 1.0f / std::sqrt(static_cast<float>(e));
  for (int at = 0; at < t; at += kQueries) {
    const int rows = std::min(kQueries, t - at);
    for (int r = 0; r < rows; ++r) {
      scaled(q + (at + r) * ld, scale, e, queries + r * e);
    }
    float_product_all(queries, e, rows, e, keys, 0, tp / kWide, tp, scores, tp);
    float inverse[kQueries];
    for (int r = 0; r < rows; ++r) {
      inverse[r] =
          softmax_numerators(scores + static_cast<size_t>(r) * tp, tp, all ? nullptr : hidden);
    }
    float* to = out + at * ldo;
    float_product_all(scores, tp, rows, t, values, 0, ep / kWide, e, to, ldo);
    for (int r = 0; r < rows; ++r) scaled(to + r * ldo, inverse[r], e, to + r * ldo);
  }
}

}  // namespace
}  // namespace nomatmul
