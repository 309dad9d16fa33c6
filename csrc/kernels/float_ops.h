// Float steps between the ternary products, written once and compiled into every ISA's file.
//
// Contract: results have the same bits on every ISA (a NaN is a NaN, its payload is not promised).
// Three things make it so: sums run in 16 fixed lanes (element e in lane e % 16) and are folded by
// a fixed tree; every step is a plain IEEE +, -, *, / or sqrt (files are compiled with
// -ffp-contract=off and without fast-math); exp is the polynomial below, not the C library's.
//
// Vectors are the compiler's own (GCC and clang): 8 floats, lowered to whatever the ISA has.
// Everything sits in an anonymous namespace: a function compiled for AVX-512 must never be merged
// by the linker with the one compiled for the baseline.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels.h"

// Passing 32-byte vectors by value between inlined functions of one file is no ABI question.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace nomatmul {
namespace {

using F8 = float __attribute__((vector_size(32)));
using F4 = float __attribute__((vector_size(16)));
using D4 = double __attribute__((vector_size(32)));
using I8 = int32_t __attribute__((vector_size(32)));
using U8 = uint32_t __attribute__((vector_size(32)));
using B8 = int8_t __attribute__((vector_size(8)));
constexpr int kLanes = 8;

inline F8 splat(float v) { return F8{v, v, v, v, v, v, v, v}; }
inline I8 splat_int(int32_t v) { return I8{v, v, v, v, v, v, v, v}; }
inline I8 bits_of(F8 v) { return reinterpret_cast<I8>(v); }
inline F8 floats_of(I8 v) { return reinterpret_cast<F8>(v); }

inline F8 load8(const float* p) {
  F8 v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store8(float* p, F8 v) { std::memcpy(p, &v, sizeof v); }

// The first n (< 8) floats; the rest are zero, which no step turns into anything but a finite
// value.
inline F8 load_part(const float* p, int n) {
  float lanes[kLanes] = {};
  for (int j = 0; j < n; ++j) lanes[j] = p[j];
  return load8(lanes);
}
inline void store_part(float* p, F8 v, int n) {
  float lanes[kLanes];
  store8(lanes, v);
  for (int j = 0; j < n; ++j) p[j] = lanes[j];
}

inline F8 absolute(F8 v) { return floats_of(bits_of(v) & splat_int(0x7fffffff)); }
// Keeps b where either is NaN, so callers look for NaN elsewhere.
inline F8 larger(F8 a, F8 b) { return a > b ? a : b; }

// Folds lanes 7..0: (0+4, 1+5, 2+6, 3+7), then (0+2, 1+3), then 0+1.
inline float fold_sum(F8 v) {
  float a[kLanes];
  store8(a, v);
  return ((a[0] + a[4]) + (a[2] + a[6])) + ((a[1] + a[5]) + (a[3] + a[7]));
}
inline float fold_max(F8 v) {
  float a[kLanes];
  store8(a, v);
  float top = a[0];
  for (int j = 1; j < kLanes; ++j) top = a[j] > top ? a[j] : top;
  return top;
}

// Calls step(offset, loader, storer) for each 8 elements; the last call may be a part.
template <class Step>
inline void for_each_8(int d, Step step) {
  int e = 0;
  for (; e + kLanes <= d; e += kLanes) {
    step(e, [](const float* p) { return load8(p); }, [](float* p, const F8& v) { store8(p, v); });
  }
  const int rest = d - e;
  if (rest > 0) {
    step(
        e, [rest](const float* p) { return load_part(p, rest); },
        [rest](float* p, const F8& v) { store_part(p, v, rest); });
  }
}

// exp(x) for x in [-88, 88], relative error below 2e-7 (a few ulp, mostly from the last sums).
// x = n ln2 + r with |r| <= ln2 / 2, ln2 in two parts so that n * high is exact; the polynomial's
// coefficients are those of the Cephes library's expf (S. Moshier, public).
inline F8 exp_poly(F8 x) {
  const F8 shifter = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const F8 biased = x * splat(1.44269504088896341f) + shifter;
  const F8 n = biased - shifter;
  const F8 r = (x - n * splat(0.693359375f)) - n * splat(-2.12194440e-4f);
  F8 p = splat(1.9875691500e-4f);
  p = p * r + splat(1.3981999507e-3f);
  p = p * r + splat(8.3334519073e-3f);
  p = p * r + splat(4.1665795894e-2f);
  p = p * r + splat(1.6666665459e-1f);
  p = p * r + splat(5.0000001201e-1f);
  p = (p * (r * r) + r) + splat(1.0f);
  // unsigned: a NaN's bits may wrap
  const U8 exponent = (reinterpret_cast<U8>(biased) - reinterpret_cast<U8>(shifter) + 127u) << 23;
  return p * reinterpret_cast<F8>(exponent);
}

// 1 / (1 + exp(-x)); exactly 0 below -88 (the true value is under 2^-126), 1 above 88.
inline F8 sigmoid(F8 x) {
  F8 y = x > splat(88.0f) ? splat(88.0f) : x;
  y = y < splat(-88.0f) ? splat(-88.0f) : y;
  const F8 s = splat(1.0f) / (splat(1.0f) + exp_poly(-y));
  return x < splat(-88.0f) ? splat(0.0f) : s;
}
inline F8 silu(F8 x) { return x * sigmoid(x); }

// sqrt(mean(x^2) + eps): float squares, summed in double, the mean rounded to float. Callers divide
// by the root instead of multiplying by its reciprocal. So numpy, torch and this file agree on the
// bits of a norm, hence on which way int8 roundings fall (docs/numerics.md says why that matters).
inline float root_mean_square(const float* x, float eps, int d) {
  D4 sums[4] = {};  // of lanes 0-3, 4-7, 8-11, 12-15
  const auto add_squares = [&sums](const float* p) {
    for (int part = 0; part < 4; ++part) {
      F4 a;
      std::memcpy(&a, p + 4 * part, sizeof a);
      sums[part] = sums[part] + __builtin_convertvector(a * a, D4);
    }
  };
  int e = 0;
  for (; e + 2 * kLanes <= d; e += 2 * kLanes) add_squares(x + e);
  if (e < d) {
    float last[2 * kLanes] = {};
    for (int j = 0; e + j < d; ++j) last[j] = x[e + j];
    add_squares(last);
  }
  double s[kLanes];
  const D4 low = sums[0] + sums[2], high = sums[1] + sums[3];
  std::memcpy(s, &low, sizeof low);
  std::memcpy(s + 4, &high, sizeof high);
  const double sum = ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
  const float mean = static_cast<float>(sum / static_cast<double>(d));
  return __builtin_sqrtf(mean + eps);
}

// Half away from zero: v - trunc(v) is exact, so 0.49999997 stays 0 and 0.5 becomes 1. Here
// |v| <= 127.00001 (v = y * (127 / absmax)), so the conversions are defined.
inline I8 round_half_away(F8 v) {
  const I8 whole = __builtin_convertvector(v, I8);
  const F8 part = v - __builtin_convertvector(whole, F8);
  const I8 up = (part >= splat(0.5f)) & splat_int(1);
  const I8 down = part <= splat(-0.5f);  // -1 where true
  return whole + up + down;
}

inline I8 clip_int8(I8 v) {
  const I8 low = v < splat_int(-128) ? splat_int(-128) : v;
  return low > splat_int(127) ? splat_int(127) : low;
}

inline void store_int8(int8_t* q, I8 v, int n) {
  const B8 bytes = __builtin_convertvector(clip_int8(v), B8);
  std::memcpy(q, &bytes, static_cast<size_t>(n));
}

// q = quantise(value(element)) for a value that is computed twice: once for its maximum.
template <class Value>
inline float quantise(int d, int8_t* q, Value value) {
  F8 top = splat(0.0f), poison = splat(0.0f);
  for_each_8(d, [&](int e, auto load, auto) {
    const F8 y = value(e, load);
    top = larger(absolute(y), top);
    poison = poison + y * splat(0.0f);  // 0 * inf and 0 * NaN are NaN
  });
  const float bad = fold_sum(poison);
  if (bad != bad) return bad;
  const float absmax = fold_max(larger(top, splat(1e-5f)));
  const F8 scale = splat(127.0f / absmax);
  // Four vectors at a time: compilers narrow an array of 32 well, and one vector of 8 badly.
  constexpr int kRun = 4 * kLanes;
  int e = 0;
  for (; e + kRun <= d; e += kRun) {
    int32_t wide[kRun];
    for (int j = 0; j < kRun; j += kLanes) {
      const I8 v = clip_int8(round_half_away(value(e + j, load8) * scale));
      std::memcpy(wide + j, &v, sizeof v);
    }
    for (int j = 0; j < kRun; ++j) q[e + j] = static_cast<int8_t>(wide[j]);
  }
  for_each_8(d - e, [&](int rest, auto load, auto) {
    const int at = e + rest;
    store_int8(q + at, round_half_away(value(at, load) * scale), d - at < kLanes ? d - at : kLanes);
  });
  return absmax / 127.0f;
}

float rms_norm_quantize(const float* x, const float* w, float eps, int d, int8_t* q) {
  const F8 root = splat(root_mean_square(x, eps, d));
  return quantise(d, q, [=](int e, auto load) { return (load(x + e) / root) * load(w + e); });
}

void normalise(const float* x, float eps, int d, float* y) {
  const F8 root = splat(root_mean_square(x, eps, d));
  for_each_8(d, [&](int e, auto load, auto store) { store(y + e, load(x + e) / root); });
}

float scale_quantize(const float* y, const float* w, int d, int8_t* q) {
  return quantise(d, q, [=](int e, auto load) { return load(y + e) * load(w + e); });
}

void rms_norm(const float* x, const float* w, float eps, int d, float* y) {
  const F8 root = splat(root_mean_square(x, eps, d));
  for_each_8(
      d, [&](int e, auto load, auto store) { store(y + e, (load(x + e) / root) * load(w + e)); });
}

void mlgru_step(const float* i, const float* f, const float* lb, float keep, int d, float* h) {
  const F8 one = splat(1.0f), kept = splat(keep);
  for_each_8(d, [&](int e, auto load, auto store) {
    F8 forget = sigmoid(load(f + e));
    if (lb != nullptr) {
      const F8 bound = load(lb + e);
      forget = bound + (one - bound) * forget;
    }
    const F8 input = (silu(load(i + e)) * (one - forget)) * kept;
    store(h + e, forget * load(h + e) + input);
  });
}

void gate_norm(const float* g, const float* h, const float* w, float eps, int d, float* y) {
  const F8 root = splat(root_mean_square(g, eps, d));
  for_each_8(d, [&](int e, auto load, auto store) {
    store(y + e, ((load(g + e) / root) * load(w + e)) * silu(load(h + e)));
  });
}

void silu_mul(const float* gate, const float* up, int d, float* y) {
  for_each_8(
      d, [&](int e, auto load, auto store) { store(y + e, silu(load(gate + e)) * load(up + e)); });
}

void add(float* x, const float* y, int d) {
  for_each_8(d, [&](int e, auto load, auto store) { store(x + e, load(x + e) + load(y + e)); });
}

// A byte b encodes v iff b = ceil(v * 256 / 243), that is iff the low byte of 243 b is at most 242
// (the 13 other bytes are reached by no v). A 2-bit code 3 has both of its bits set.
bool codes_ok(Packing packing, const uint8_t* w, size_t nbytes) {
  constexpr size_t kRun = 4096;  // small enough to stop early, large enough to vectorise
  for (size_t start = 0; start < nbytes; start += kRun) {
    const size_t end = nbytes - start < kRun ? nbytes : start + kRun;
    uint8_t bad = 0;
    if (packing == Packing::kTwoBit) {
      for (size_t b = start; b < end; ++b) bad |= static_cast<uint8_t>(w[b] & (w[b] >> 1) & 0x55);
    } else {
      for (size_t b = start; b < end; ++b) {
        bad |= static_cast<uint8_t>(static_cast<uint8_t>(w[b] * 243) > 242 ? 1 : 0);
      }
    }
    if (bad != 0) return false;
  }
  return true;
}

}  // namespace
}  // namespace nomatmul
