// exp, sigmoid and silu of csrc/kernels/common/float_vectors.h, operation by operation (compile with
// --fmad=false): results have the bits of the native core and of the triton path.
#pragma once

__device__ __forceinline__ float exp_poly(float x) {
  const float shifter = 12582912.0f;
  const float biased = x * 1.44269504088896341f + shifter;
  const float n = biased - shifter;
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * (r * r) + r) + 1.0f;
  return p * __uint_as_float((__float_as_uint(biased) - 0x4B400000u + 127u) << 23);
}
__device__ __forceinline__ float sigmoid(float x) {
  float y = x > 88.0f ? 88.0f : x;
  y = y < -88.0f ? -88.0f : y;
  const float s = __frcp_rn(1.0f + exp_poly(-y));
  return x < -88.0f ? 0.0f : s;
}
__device__ __forceinline__ float silu(float x) { return x * sigmoid(x); }
