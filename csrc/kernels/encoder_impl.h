// The encoder's kernels, written once with the compiler's vectors. A file that includes this has
// defined NOMATMUL_LANES (floats in a vector), and has the primitives of the int8 product:
//   kProductRows                           tokens at once, so that 2 sums each stay in registers
//   Acc     kLanes sums of int32
//   load_pairs(const int8_t* p)            2 * kLanes values, widened
//   broadcast_pair(const int16_t* p)       p[0], p[1] in every lane
//   multiply_add(Acc, pairs, pairs)        sums of products of pairs
//   scale_store(Acc, const float* row_scale, float step, float* out, int count)
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "encoder_ops.h"

namespace nomatmul {
namespace {

constexpr int kLanes = NOMATMUL_LANES;
typedef float V __attribute__((vector_size(4 * NOMATMUL_LANES)));
typedef int32_t VI __attribute__((vector_size(4 * NOMATMUL_LANES)));

inline V load(const float* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, V v) { std::memcpy(p, &v, sizeof v); }
inline V splat(float x) { return x - V{}; }  // + would be computed: -0 + 0 is not -0
inline V larger(V a, V b) { return a > b ? a : b; }

inline float sum(V v) {
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
}
inline float largest(V v) {
  float top = v[0];
  for (int i = 1; i < kLanes; ++i) top = v[i] > top ? v[i] : top;
  return top;
}

// Calls fn(vector) for x in place; what is left over goes through a padded vector.
template <class F>
inline void in_place(float* x, size_t count, F fn) {
  size_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(x + i, fn(load(x + i)));
  if (i == count) return;
  float rest[kLanes] = {};
  std::memcpy(rest, x + i, (count - i) * sizeof(float));
  store(rest, fn(load(rest)));
  std::memcpy(x + i, rest, (count - i) * sizeof(float));
}

// e^x for x <= 0 and moderate x above; below -87 it is 0. Cephes' polynomial, two units in the
// last place.
inline V exp_of(V x) {
  const V tiny = splat(-87.0f);
  const VI drop = x < tiny;
  x = drop ? tiny : x;  // this way round a NaN stays one
  x = x > 88.0f ? splat(88.0f) : x;
  const V shifted = x * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23: rounds to an integer
  const V n = shifted - 12582912.0f;
  V r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  V p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const V y = p * (r * r) + r + 1.0f;
  const VI power = (__builtin_convertvector(n, VI) + 127) << 23;
  V two_n;
  std::memcpy(&two_n, &power, sizeof two_n);
  const V result = y * two_n;
  return drop ? V{} : result;
}

// x * Phi(x); erf by Abramowitz and Stegun 7.1.26 (error below 1.5e-7).
inline V gelu_of(V x) {
  const V z = (x < 0 ? -x : x) * 0.70710678118654752f;
  const V t = 1.0f / (1.0f + 0.3275911f * z);
  V p = splat(1.061405429f);
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const V tail = p * t * exp_of(-(z * z));  // 1 - erf(z)
  return 0.5f * x * (x < 0 ? tail : 2.0f - tail);
}

inline V silu_of(V x) {
  const V e = exp_of(x < 0 ? x : -x);
  return x * (x < 0 ? e / (1.0f + e) : 1.0f / (1.0f + e));
}

void gelu_all(float* x, size_t count) { in_place(x, count, gelu_of); }
void silu_all(float* x, size_t count) { in_place(x, count, silu_of); }
void relu_all(float* x, size_t count) {
  // not larger(): a NaN must stay one
  in_place(x, count, [](V v) { return v < 0 ? V{} : v; });
}

bool add_norm_one(float* x, const float* delta, const float* weight, const float* bias, float eps,
                  int d, float* y) {
  const int whole = d / kLanes * kLanes;
  V sums = {};
  float rest = 0;
  if (delta != nullptr) {
    for (int i = 0; i < whole; i += kLanes) store(x + i, load(x + i) + load(delta + i));
    for (int i = whole; i < d; ++i) x[i] += delta[i];
  }
  float mean = 0;
  if (bias != nullptr) {
    for (int i = 0; i < whole; i += kLanes) sums += load(x + i);
    for (int i = whole; i < d; ++i) rest += x[i];
    mean = (sum(sums) + rest) / static_cast<float>(d);
  }
  sums = V{};
  rest = 0;
  for (int i = 0; i < whole; i += kLanes) {
    const V c = load(x + i) - mean;
    sums += c * c;
  }
  for (int i = whole; i < d; ++i) rest += (x[i] - mean) * (x[i] - mean);
  const float variance = (sum(sums) + rest) / static_cast<float>(d);
  const float scale = 1.0f / std::sqrt(variance + eps);
  for (int i = 0; i < whole; i += kLanes) {
    V v = (load(x + i) - mean) * scale * load(weight + i);
    if (bias != nullptr) v += load(bias + i);
    store(y + i, v);
  }
  for (int i = whole; i < d; ++i) {
    y[i] = (x[i] - mean) * scale * weight[i] + (bias != nullptr ? bias[i] : 0.0f);
  }
  return std::isfinite(variance);
}

// --- attention -------------------------------------------------------------

constexpr int kRows = 6;           // queries at once: 12 sums, 2 of b, 1 of a in 16 registers
constexpr int kWide = 2 * kLanes;  // columns at once

inline int round_up(int n, int step) { return (n + step - 1) / step * step; }

// c[kRows][n] = a[kRows][k] * b[k][n]; n is a multiple of kWide.
inline void small_product(const float* a, size_t lda, const float* b, size_t ldb, int k, int n,
                          float* c, size_t ldc) {
  for (int j = 0; j < n; j += kWide) {
    V acc[kRows][2] = {};
    for (int i = 0; i < k; ++i) {
      const V b0 = load(b + i * ldb + j), b1 = load(b + i * ldb + j + kLanes);
      for (int r = 0; r < kRows; ++r) {
        const V value = splat(a[r * lda + i]);
        acc[r][0] += value * b0;
        acc[r][1] += value * b1;
      }
    }
    for (int r = 0; r < kRows; ++r) {
      store(c + r * ldc + j, acc[r][0]);
      store(c + r * ldc + j + kLanes, acc[r][1]);
    }
  }
}

// s = exp(s - max) over n scores (a multiple of kWide, hidden ones -inf); returns 1 / sum.
inline float soften(float* s, int n) {
  V top = load(s);
  for (int i = kLanes; i < n; i += kLanes) top = larger(load(s + i), top);
  const float peak = largest(top);
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
  return e * tp + t * ep + tp + kRows * (tp + ep + e);
}

void attention_head(const float* q, const float* k, const float* v, size_t ld, const uint8_t* seen,
                    int t, int e, float* scratch, float* out, size_t ldo) {
  const int tp = round_up(t, kWide), ep = round_up(e, kWide);
  float* keys = scratch;                                 // [e][tp]
  float* values = keys + static_cast<size_t>(e) * tp;    // [t][ep]
  float* hidden = values + static_cast<size_t>(t) * ep;  // [tp]: 0, or -inf for a hidden key
  float* scores = hidden + tp;                           // [kRows][tp]
  float* mixed = scores + static_cast<size_t>(kRows) * tp;
  float* queries = mixed + static_cast<size_t>(kRows) * ep;
  for (int s = 0; s < tp; s += kLanes) {  // rows lie pages apart: a few of them at a time
    for (int i = 0; i < e; ++i) {
      float* to = keys + static_cast<size_t>(i) * tp + s;
      for (int j = 0; j < kLanes; ++j) to[j] = s + j < t ? k[(s + j) * ld + i] : 0.0f;
    }
  }
  for (int s = 0; s < t; ++s) {
    std::memcpy(values + static_cast<size_t>(s) * ep, v + s * ld, e * sizeof(float));
    for (int i = e; i < ep; ++i) values[static_cast<size_t>(s) * ep + i] = 0;
  }
  for (int s = 0; s < tp; ++s) {
    const bool open = s < t && (seen == nullptr || seen[s] != 0);
    hidden[s] = open ? 0 : -std::numeric_limits<float>::infinity();
  }
  const float scale = 1.0f / std::sqrt(static_cast<float>(e));
  for (int at = 0; at < t; at += kRows) {
    const int rows = std::min(kRows, t - at);
    for (int r = 0; r < kRows; ++r) {
      const float* from = q + (at + std::min(r, rows - 1)) * ld;
      for (int i = 0; i < e; ++i) queries[r * e + i] = from[i] * scale;
    }
    small_product(queries, e, keys, tp, e, tp, scores, tp);
    float inverse[kRows];
    for (int r = 0; r < rows; ++r) {
      float* s = scores + static_cast<size_t>(r) * tp;
      for (int i = 0; i < tp; i += kLanes) store(s + i, load(s + i) + load(hidden + i));
      inverse[r] = soften(s, tp);
    }
    small_product(scores, tp, values, ep, t, ep, mixed, ep);
    for (int r = 0; r < rows; ++r) {
      for (int i = 0; i < e; ++i) out[(at + r) * ldo + i] = mixed[r * ep + i] * inverse[r];
    }
  }
}

// --- float32 product -------------------------------------------------------

// Inputs of a panel at once: kWide columns of them stay in the first cache beside the rows.
constexpr int kDeep = 2048 / kLanes;

template <int kR>
inline void float_rows(const float* x, size_t ldx, int from, int to, const float* panel,
                       int columns, float* out, size_t ldo) {
  float edge[kR * kWide];
  float* c = columns == kWide ? out : edge;
  const size_t ldc = columns == kWide ? ldo : kWide;
  if (c == edge && from > 0) {
    for (int r = 0; r < kR; ++r)
      std::memcpy(edge + r * kWide, out + r * ldo, columns * sizeof(float));
  }
  V acc[kR][2] = {};
  if (from > 0) {
    for (int r = 0; r < kR; ++r) {
      acc[r][0] = load(c + r * ldc);
      acc[r][1] = load(c + r * ldc + kLanes);
    }
  }
  for (int i = from; i < to; ++i) {
    const V w0 = load(panel + static_cast<size_t>(i) * kWide);
    const V w1 = load(panel + static_cast<size_t>(i) * kWide + kLanes);
    for (int r = 0; r < kR; ++r) {
      const V value = splat(x[r * ldx + i]);
      acc[r][0] += value * w0;
      acc[r][1] += value * w1;
    }
  }
  for (int r = 0; r < kR; ++r) {
    store(c + r * ldc, acc[r][0]);
    store(c + r * ldc + kLanes, acc[r][1]);
  }
  if (c == edge) {
    for (int r = 0; r < kR; ++r)
      std::memcpy(out + r * ldo, edge + r * kWide, columns * sizeof(float));
  }
}

void float_product_all(const float* x, size_t ldx, int rows, int k, const float* panels, int p0,
                       int p1, int m, float* out, size_t ldo) {
  for (int p = p0; p < p1; ++p) {  // the outputs of one panel stay in the first cache
    const float* panel = panels + static_cast<size_t>(p) * k * kWide;
    const int at = p * kWide, columns = std::min(kWide, m - at);
    for (int from = 0; from < k; from += kDeep) {
      const int to = std::min(k, from + kDeep);
      int t = 0;
      for (; t + kRows <= rows; t += kRows) {
        float_rows<kRows>(x + t * ldx, ldx, from, to, panel, columns, out + t * ldo + at, ldo);
      }
      const float* last = x + t * ldx;
      float* end = out + t * ldo + at;
      switch (rows - t) {
        case 5:
          float_rows<5>(last, ldx, from, to, panel, columns, end, ldo);
          break;
        case 4:
          float_rows<4>(last, ldx, from, to, panel, columns, end, ldo);
          break;
        case 3:
          float_rows<3>(last, ldx, from, to, panel, columns, end, ldo);
          break;
        case 2:
          float_rows<2>(last, ldx, from, to, panel, columns, end, ldo);
          break;
        case 1:
          float_rows<1>(last, ldx, from, to, panel, columns, end, ldo);
          break;
        default:
          break;
      }
    }
  }
}

// --- int8 product ----------------------------------------------------------

template <int kR>
inline void product_rows(const int16_t* q, size_t ldq, int pairs, const int8_t* panel, int columns,
                         const float* row_scale, const float* step, float* out, size_t ldo) {
  Acc acc[kR][2] = {};
  for (int i = 0; i < pairs; ++i) {
    const auto w0 = load_pairs(panel + static_cast<size_t>(i) * 2 * kWide);
    const auto w1 = load_pairs(panel + static_cast<size_t>(i) * 2 * kWide + kWide);
    for (int r = 0; r < kR; ++r) {
      const auto x = broadcast_pair(q + r * ldq + 2 * i);
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

#define NOMATMUL_ENCODER_TABLE(symbol, label)                                      \
  namespace nomatmul {                                                             \
  const EncoderKernels symbol = {                                                  \
      label,          add_norm_one,     gelu_all, silu_all,          relu_all,     \
      attention_head, attention_floats, kWide,    float_product_all, product_all}; \
  }
