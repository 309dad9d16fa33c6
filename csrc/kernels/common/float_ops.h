// Float steps between the ternary products, written once and compiled into every ISA's file.
//
// Contract: results have the same bits on every ISA (a NaN is a NaN, its payload is not promised).
// Three things make it so: sums run in 16 fixed lanes (element e in lane e % 16) and are folded by
// a fixed tree; every step is a plain IEEE +, -, *, / or sqrt (files are compiled with
// -ffp-contract=off and without fast-math); exp is the polynomial of float_vectors.h, not the C
// library's.
//
// Everything sits in an anonymous namespace, as float_vectors.h explains.
#pragma once

#include "kernels/common/float_vectors.h"
#include "kernels/ternary.h"

namespace nomatmul {
namespace {

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

float rms_norm_quantize(const float* x, const float* w, float eps, int d, int8_t* q) {
  const F8 root = splat(root_mean_square(x, eps, d));
  return quantise(d, q, [=](int e, auto load) { return (load(x + e) / root) * load(w + e); });
}

void normalise(const float* x, float eps, int d, float* y) {
  const F8 root = splat(root_mean_square(x, eps, d));
  for_each_8(d, [&](int e, auto load, auto store) { store(y + e, load(x + e) / root); });
}

template <Rounding kRounding>
float scale_quantize_as(const float* y, const float* w, int d, int8_t* q) {
  if (w == nullptr) return quantise<kRounding>(d, q, [=](int e, auto load) { return load(y + e); });
  return quantise<kRounding>(d, q, [=](int e, auto load) { return load(y + e) * load(w + e); });
}

float scale_quantize(const float* y, const float* w, Rounding rounding, int d, int8_t* q) {
  switch (rounding) {
    case Rounding::kEven:
      return scale_quantize_as<Rounding::kEven>(y, w, d, q);
    case Rounding::kUp:
      return scale_quantize_as<Rounding::kUp>(y, w, d, q);
    case Rounding::kAway:
      break;
  }
  return scale_quantize_as<Rounding::kAway>(y, w, d, q);
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

// relu() that keeps a NaN, which the quantiser of the next linear then finds.
inline F8 positive(F8 x) { return x == x ? relu(x) : x; }

template <class Act>
void gated_by(Act act, const float* gate, const float* up, int d, float* y) {
  for_each_8(
      d, [&](int e, auto load, auto store) { store(y + e, act(load(gate + e)) * load(up + e)); });
}

void gated(Activation kind, const float* gate, const float* up, int d, float* y) {
  switch (kind) {
    case Activation::kGelu:
      return gated_by([](F8 x) { return gelu(x); }, gate, up, d, y);
    case Activation::kSilu:
      return gated_by([](F8 x) { return silu(x); }, gate, up, d, y);
    case Activation::kRelu:
      return gated_by(positive, gate, up, d, y);
    case Activation::kRelu2:
      return gated_by([](F8 x) { return positive(x) * positive(x); }, gate, up, d, y);
  }
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

// What each <isa>/ternary.cc defines, from its products and the functions above.
#define NOMATMUL_TERNARY(Products) \
  {Products::prepared_bytes,       \
   Products::prepare,              \
   Products::scratch_bytes,        \
   Products::product,              \
   rms_norm_quantize,              \
   normalise,                      \
   scale_quantize,                 \
   rms_norm,                       \
   mlgru_step,                     \
   gate_norm,                      \
   gated,                          \
   add,                            \
   codes_ok}
