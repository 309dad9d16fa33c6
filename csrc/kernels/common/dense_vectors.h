// Vectors of NOMATMUL_LANES floats, and e^x of them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

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

// An instruction set's own vector of floats as the compiler's.
template <class Floats>
inline V vector_of(Floats floats) {
  V v;
  std::memcpy(&v, &floats, sizeof v);
  return v;
}

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

}  // namespace
}  // namespace nomatmul
