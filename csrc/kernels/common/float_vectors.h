// Vectors of 8 floats, and the few functions of one float that the layers need.
//
// Every step is a plain IEEE operation (no fused multiply-add, no fast-math), and exp and erf are
// polynomials written out here, not the C library's: so results have the same bits on every ISA.
//
// Vectors are the compiler's own (GCC and clang), lowered to whatever the ISA has. Everything sits
// in an anonymous namespace: a function compiled for AVX-512 must never be merged by the linker
// with the one compiled for the baseline.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels/rounding.h"

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

// Half away from zero: v - trunc(v) is exact, so 0.49999997 stays 0 and 0.5 becomes 1. Here
// |v| <= 127.00001 (v = y * (127 / absmax)), so the conversions are defined.
inline I8 round_half_away(F8 v) {
  const I8 whole = __builtin_convertvector(v, I8);
  const F8 part = v - __builtin_convertvector(whole, F8);
  const I8 up = (part >= splat(0.5f)) & splat_int(1);
  const I8 down = part <= splat(-0.5f);  // -1 where true
  return whole + up + down;
}

// The other ties. Even: adding 1.5 * 2^23 rounds as the hardware does. Up: floor(v + 0.5), the sum
// rounded to float, as its authors compute it.
inline I8 round_half_even(F8 v) {
  const F8 shifter = splat(12582912.0f);
  return __builtin_convertvector((v + shifter) - shifter, I8);
}
inline I8 round_half_up(F8 v) {
  const F8 sum = v + splat(0.5f);
  const I8 whole = __builtin_convertvector(sum, I8);
  return whole + (__builtin_convertvector(whole, F8) > sum);  // -1 where it was rounded up
}

template <Rounding kRounding>
inline I8 rounded(F8 v) {
  if constexpr (kRounding == Rounding::kEven) return round_half_even(v);
  if constexpr (kRounding == Rounding::kUp) return round_half_up(v);
  return round_half_away(v);
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
template <Rounding kRounding = Rounding::kAway, class Value>
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
      const I8 v = clip_int8(rounded<kRounding>(value(e + j, load8) * scale));
      std::memcpy(wide + j, &v, sizeof v);
    }
    for (int j = 0; j < kRun; ++j) q[e + j] = static_cast<int8_t>(wide[j]);
  }
  for_each_8(d - e, [&](int rest, auto load, auto) {
    const int at = e + rest;
    store_int8(q + at, rounded<kRounding>(value(at, load) * scale),
               d - at < kLanes ? d - at : kLanes);
  });
  return absmax / 127.0f;
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

// exp(-d) for |d| below 1/16 and some more: four terms.
inline F8 exp_of_little(F8 minus) {
  F8 p = splat(4.1666667e-2f);
  p = p * minus + splat(1.6666667e-1f);
  p = p * minus + splat(0.5f);
  p = p * minus + splat(1.0f);
  return p * minus + splat(1.0f);
}

// x * Phi(x), the exact GELU of BERT (error function, no tanh). Relative error below 6e-7 for every
// x above -12.9; below that the true value is under 4e-37 in size, and the result is 0.
//
// With a = |x|: Phi(-a) = exp(-a^2 / 2) * P(u), u = (a - 3) / (a + 3), where P is our own minimax
// fit of erfcx(a / sqrt 2) / 2 on [0, 13.3] (relative error 7e-9 in exact arithmetic; made by
// Lawson's iteration). a^2 is split into an exact square of a's high bits and a small rest, or its
// rounding would cost 88 units in the last place of the exponential.
inline F8 gelu(F8 x) {
  const F8 size = absolute(x);
  const F8 a = size > splat(12.9f) ? splat(12.9f) : size;
  const F8 high = floats_of(bits_of(a) & splat_int(~0xfff));
  const F8 rest = (a - high) * (a + high);
  const F8 bell = exp_poly(high * high * splat(-0.5f)) * exp_of_little(rest * splat(-0.5f));
  const F8 u = (a - splat(3.0f)) / (a + splat(3.0f));
  F8 p = splat(5.4151025e-5f);
  p = p * u + splat(1.16037626e-4f);
  p = p * u + splat(-3.39911433e-4f);
  p = p * u + splat(-9.84184009e-4f);
  p = p * u + splat(2.90470263e-3f);
  p = p * u + splat(6.13218314e-3f);
  p = p * u + splat(-4.62133138e-2f);
  p = p * u + splat(1.23225022e-1f);
  p = p * u + splat(-2.06402618e-1f);
  p = p * u + splat(1.21513948e-1f);
  const F8 tail = size > splat(12.9f) ? splat(0.0f) : bell * p;
  return x * (x > splat(0.0f) ? splat(1.0f) - tail : tail);
}

inline F8 relu(F8 x) { return x > splat(0.0f) ? x : splat(0.0f); }

}  // namespace
}  // namespace nomatmul
