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
#include "unroll.h"

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

// e^x for x <= 0; below -87 it is 0. Cephes' polynomial, two units in the last place.
inline V exp_of(V x) {
  const V tiny = splat(-87.0f);
  const VI drop = x < tiny;
  x = drop ? tiny : x;                                       // this way round a NaN stays one
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
  V poison = {};  // 0 * inf and 0 * NaN are NaN
  float last = 0;
  for (int i = 0; i < whole; i += kLanes) {
    V v = (load(x + i) - mean) * scale * load(weight + i);
    if (bias != nullptr) v += load(bias + i);
    poison += v * 0.0f;
    store(y + i, v);
  }
  for (int i = whole; i < d; ++i) {
    y[i] = (x[i] - mean) * scale * weight[i] + (bias != nullptr ? bias[i] : 0.0f);
    last += y[i] * 0.0f;
  }
  return std::isfinite(variance) && std::isfinite(sum(poison) + last);
}

// --- float32 product -------------------------------------------------------

constexpr int kRows = 6;  // rows at once: 12 sums, 2 of weights, 1 of inputs of 16 registers
constexpr int kWide = 2 * kLanes;     // outputs at once: a panel
constexpr int kDeep = 6144 / kLanes;  // inputs at once: 48 KiB of a panel
constexpr int kPace = 32;             // inputs between two calls of lines into cache
constexpr int kLine = 64;             // bytes
constexpr int kAheadBytes = 12288;    // shorter pieces of panels come from a near cache

// Weights that the next strips will read, and how many lines of them each pace calls into cache.
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
  // do: a loop that may have no turn would keep a second copy of the sums on the stack
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
      // While this piece of a panel is multiplied, the one behind it is called. Few strips would
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

// --- attention -------------------------------------------------------------

constexpr int kQueries = 4 * kRows;  // at once

inline int round_up(int n, int step) { return (n + step - 1) / step * step; }

// s = exp(s - max) over n scores (a multiple of kLanes); returns 1 / sum. hidden, or nullptr: to be
// added before, -inf for keys that nobody sees.
inline float soften(float* s, int n, const float* hidden) {
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
inline void turn(const float* from, size_t ldf, float* to, size_t ldt) {
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
      turn(k + s * ld + i, ld, panel + static_cast<size_t>(i) * kWide, kWide);
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
      inverse[r] = soften(scores + static_cast<size_t>(r) * tp, tp, all ? nullptr : hidden);
    }
    float* to = out + at * ldo;
    float_product_all(scores, tp, rows, t, values, 0, ep / kWide, e, to, ldo);
    for (int r = 0; r < rows; ++r) scaled(to + r * ldo, inverse[r], e, to + r * ldo);
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
