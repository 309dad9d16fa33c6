// Float steps of decode.cu: those of csrc/kernels/common/float_ops.h, operation by operation (compile with
// --fmad=false), so results have the bits of the native core and of the triton path.
#pragma once

#include "decode_machine.cuh"
#include "float_steps.cuh"

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int largest(int a, int b) { return a > b ? a : b; }
__host__ __device__ constexpr int least(int a, int b) { return a < b ? a : b; }

// x / root, correctly rounded (Markstein: the reciprocal is, and the remainder is exact). Where x
// is too small for that, both forms end as the int8 value 0.
struct Divisor {
  float root, inverse;
  __device__ __forceinline__ explicit Divisor(float r) : root(r), inverse(__frcp_rn(r)) {}
  __device__ __forceinline__ float under(float x) const {
    const float near = x * inverse;
    return __fmaf_rn(__fmaf_rn(-near, root, x), inverse, near);
  }
};

// A float square in double, by its bits: conversions run at an eighth of the rate. Zero and
// subnormal squares become up to 2^-126, which no float sees beside an epsilon; infinity, NaN too.
__device__ __forceinline__ double widened(float square) {
  if (LEAST_EPS < 1e-12f) return (double)square;
  const u32 bits = __float_as_uint(square);
  return __hiloint2double((int)((bits >> 3) + 0x38000000u), (int)(bits << 29));
}
__device__ __forceinline__ double sum_of_squares(const float (&x)[4]) {
  float s[4];
  u32 top = 0;
#pragma unroll
  for (int k = 0; k < 4; ++k) s[k] = x[k] * x[k], top = max(top, __float_as_uint(s[k]));
  const double sum = (widened(s[0]) + widened(s[1])) + (widened(s[2]) + widened(s[3]));
  return top >= 0x7f800000u ? (double)__uint_as_float(0x7f800000u) : sum;
}

// Four int8 values, each v rounded with halves away from zero. |v| is below 127.25.
__device__ __forceinline__ u32 rounded(const float (&v)[4]) {
  u32 twice[4];  // in the last byte 2 |v| + 1, cut off: floats from 2^22 on are halves
#pragma unroll
  for (int k = 0; k < 4; ++k) twice[k] = __float_as_uint(__fadd_rz(fabsf(v[k]), 4194304.5f));
  const u32 low = bytes_of(twice[0], twice[1], 0x0040), high = bytes_of(twice[2], twice[3], 0x0040);
  const u32 sizes = bytes_of(low, high, 0x5410) >> 1 & 0x7f7f7f7fu;
  const u32 left = bytes_of(__float_as_uint(v[0]), __float_as_uint(v[1]), 0x00fb);
  const u32 right = bytes_of(__float_as_uint(v[2]), __float_as_uint(v[3]), 0x00fb);
  const u32 negative = bytes_of(left, right, 0x5410);  // 255 where v has a sign
  const u32 flipped = sizes ^ negative;
  return ((flipped & 0x7f7f7f7fu) + (negative & 0x01010101u)) ^ (flipped & 0x80808080u);
}
