// The dense kernels, written once with the compiler's vectors. A file that includes this has
// defined NOMATMUL_LANES (floats in a vector), and has the primitives of the int8 product:
//   kProductRows                           tokens at once, so that 2 sums each stay in registers
//   Acc     kLanes sums of int32
//   load_pairs(const int8_t* p)            2 * kLanes values, widened
//   broadcast_pair(int32_t)                two values of int16 in every lane
//   multiply_add(Acc, pairs, pairs)        sums of products of pairs
//   V floats_of(Acc)
#include <cmath>

#include "kernels/common/dense_attention.h"
#include "kernels/common/dense_product.h"
#include "kernels/common/dense_vectors.h"
#include "kernels/dense.h"

namespace nomatmul {
namespace {

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

void activate_all(Activation kind, float* x, size_t count) {
  switch (kind) {
    case Activation::kGelu:
      return in_place(x, count, gelu_of);
    case Activation::kSilu:
      return in_place(x, count, silu_of);
    case Activation::kRelu:  // not larger(): a NaN must stay one
      return in_place(x, count, [](V v) { return v < 0 ? V{} : v; });
    case Activation::kRelu2:
      return in_place(x, count, [](V v) { return v < 0 ? V{} : v * v; });
  }
}

bool norm_one(const float* x, const float* weight, const float* bias, float eps, int d, float* y) {
  const int whole = d / kLanes * kLanes;
  V sums = {};
  float rest = 0;
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

}  // namespace
}  // namespace nomatmul

#define NOMATMUL_DENSE \
  {norm_one, activate_all, attention_head, attention_floats, kWide, float_product_all, product_all}
