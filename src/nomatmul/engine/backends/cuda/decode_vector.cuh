// Vectors of decode.cu: how they lie, how blocks hand them on, norms and int8 values.
//
// Every block needs whole what all blocks made, and works on it with all of its threads. Elements
// lie in groups of four that are four apart: element 16 w + 4 b + p is number b of group 4 w + p,
// which is what plane p of the weights' packed word w meets. Thread n has groups n, n + kThreads,
// ...
#pragma once

#include "decode_math.cuh"

constexpr int kThreads = THREADS, kWarps = kThreads / 32;  // without the warp that copies
constexpr u32 kAbsent = 0xffffffffu;  // a word that is not there yet: a NaN that nobody writes
constexpr u32 kPatience = 1u << 21;   // polls before a block gives up, about a second
constexpr int kTops = 3;
enum Barrier { kWorkers = 1, kTaken = 2 };  // 0 is __syncthreads

__device__ __forceinline__ void sync_workers() { sync_some(kWorkers, kThreads); }

template <int kSize, int kRowBytes>
struct Vector {
  static constexpr int K = kSize, kPad = ceil_div(K, 16) * 16, kGroups = kPad / 4;
  static constexpr int kEach = ceil_div(kGroups, kThreads);
  // words of a plane of int8 values and of a vector's four: planes side by side lie in other banks
  static constexpr int kPlane = kRowBytes / 4 + (kRowBytes % 128 ? 0 : 16), kPlanes = 4 * kPlane;
  typedef float Mine[kEach][4];

  static __device__ __forceinline__ bool live(int j) {
    return (j + 1) * kThreads <= kGroups || (int)threadIdx.x + j * kThreads < kGroups;
  }
  static __device__ __forceinline__ int group(int j) { return threadIdx.x + j * kThreads; }
  static __device__ __forceinline__ int element(int j, int b) {
    return (group(j) >> 2) * 16 + 4 * b + (group(j) & 3);
  }
  static __device__ __forceinline__ void read(const float* from, Mine& out) {
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      float4 v = {0.0f, 0.0f, 0.0f, 0.0f};
      if (live(j)) v = reinterpret_cast<const float4*>(from)[group(j)];
      out[j][0] = v.x, out[j][1] = v.y, out[j][2] = v.z, out[j][3] = v.w;
    }
  }
};
__device__ __forceinline__ int place_of(int element) {
  return (element & ~15) | (element & 3) << 2 | (element >> 2 & 3);
}

struct Reduction {
  double sums[2][kWarps];
  u32 tops[kTops][kWarps];
  int sum_q[kTops][kWarps];
  int dead;
#ifdef STAMPS
  int stamped;
#endif
};

// Waits for this thread's groups of P vectors that lie one behind the other.
template <class Where, int P, int kVectors>
__device__ __forceinline__ void gather(const u32* items, typename Where::Mine (&out)[kVectors],
                                       Reduction& s) {
  constexpr int kAll = P * Where::kEach;
  uint4 v[kAll];
  bool missing[kAll];
#pragma unroll
  for (int n = 0; n < kAll; ++n) {
    missing[n] = Where::live(n % Where::kEach);
    v[n] = make_uint4(0, 0, 0, 0);
  }
  for (u32 polls = 0;; ++polls) {
#pragma unroll
    for (int n = 0; n < kAll; ++n)
      read_items(items + n / Where::kEach * Where::kPad + 4 * Where::group(n % Where::kEach),
                 missing[n], v[n]);
    bool waiting = false;
#pragma unroll
    for (int n = 0; n < kAll; ++n) {
      missing[n] = max(max(v[n].x, v[n].y), max(v[n].z, v[n].w)) == kAbsent;
      waiting |= missing[n];
    }
    if (!waiting) break;
    if (polls > kPatience || *(volatile int*)&s.dead) {
      *(volatile int*)&s.dead = 1;
      break;
    }
  }
#pragma unroll
  for (int n = 0; n < kAll; ++n) {
    float (&to)[4] = out[n / Where::kEach][n % Where::kEach];
    to[0] = __uint_as_float(v[n].x), to[1] = __uint_as_float(v[n].y);
    to[2] = __uint_as_float(v[n].z), to[3] = __uint_as_float(v[n].w);
  }
}

__device__ __forceinline__ void publish(u32* items, int element, float value) {
  const u32 bits = __float_as_uint(value);
  write_item(items + place_of(element), bits == kAbsent ? 0x7fffffffu : bits);
}

// The sum over a warp, in every lane.
__device__ __forceinline__ double warp_sum(double v) {
#pragma unroll
  for (int step = 16; step > 0; step >>= 1) v += __shfl_xor_sync(~0u, v, step);
  return v;
}

// sqrt(mean of squares + eps) of a vector; every thread gets it. One barrier.
template <class Where>
__device__ __forceinline__ float root_of(const typename Where::Mine& x, float eps, double* sums) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  double sum = 0.0;
#pragma unroll
  for (int j = 0; j < Where::kEach; ++j)
    sum = j ? sum + sum_of_squares(x[j]) : sum_of_squares(x[j]);
  sum = warp_sum(sum);
  if (lane == 0) sums[warp] = sum;
  sync_workers();
  if (kWarps <= 12) {
    sum = sums[0];
#pragma unroll
    for (int n = 1; n < kWarps; n += 2) sum += n + 1 < kWarps ? sums[n] + sums[n + 1] : sums[n];
  } else {
    sum = warp_sum(lane < kWarps ? sums[lane] : 0.0);
  }
  const float mean = (float)(sum * (1.0 / Where::K));  // the float is the quotient's but for ties
  return __fsqrt_rn(mean + eps);
}

// y becomes norm(y), with weights that lie in shared memory.
template <class Where>
__device__ __forceinline__ void normalise(typename Where::Mine& y, const float* weights, float eps,
                                          Reduction& s) {
  typename Where::Mine w;
  Where::read(weights, w);
  const Divisor root(root_of<Where>(y, eps, s.sums[0]));
#pragma unroll
  for (int j = 0; j < Where::kEach; ++j)
#pragma unroll
    for (int k = 0; k < 4; ++k) y[j][k] = root.under(y[j][k]) * w[j][k];
}

// The largest |z| of linear c, for a whole warp, and at least what a scale may be made of.
__device__ __forceinline__ float top_of(const Reduction& s, int c, int* flag) {
  const int lane = threadIdx.x & 31;
  const u32 top = __reduce_max_sync(~0u, lane < kWarps ? s.tops[c][lane] : 0u);
  if (top >= 0x7f800000u && threadIdx.x == 0) *flag = 1;
  return fmaxf(__uint_as_float(top), 1e-5f);
}

// int8 values, by planes, of the norm of y for each of C linears; 127 of them stand for `absmax`.
// Three barriers. Sums of the values wait in s.sum_q, one of each warp.
template <int C, class Where>
__device__ __forceinline__ void quantise(const typename Where::Mine& y, const float* weights,
                                         u32* q, float (&absmax)[C], Reduction& s, int* flag) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  typename Where::Mine z[C];
#pragma unroll
  for (int c = 0; c < C; ++c) Where::read(weights + c * Where::kPad, z[c]);
  const Divisor root(root_of<Where>(y, LINEAR_EPS, s.sums[1]));
  STAMP(s, 5);
  u32 tops[C];  // bits of |z| order as numbers do, infinity and NaN above all
#pragma unroll
  for (int c = 0; c < C; ++c) tops[c] = 0;
#pragma unroll
  for (int j = 0; j < Where::kEach; ++j)
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const float divided = root.under(y[j][k]);
#pragma unroll
      for (int c = 0; c < C; ++c) {
        z[c][j][k] = divided * z[c][j][k];
        tops[c] = max(tops[c], __float_as_uint(z[c][j][k]) & 0x7fffffffu);
      }
    }
#pragma unroll
  for (int c = 0; c < C; ++c) {
    tops[c] = __reduce_max_sync(~0u, tops[c]);
    if (lane == 0) s.tops[c][warp] = tops[c];
  }
  sync_workers();
  float scales[C];
  if (C == 1) {
    absmax[0] = top_of(s, 0, flag);
    scales[0] = __fdiv_rn(127.0f, absmax[0]);
  } else {  // one division, of which lane c makes linear c's
    float mine = 1.0f;
#pragma unroll
    for (int c = 0; c < C; ++c) {
      absmax[c] = top_of(s, c, flag);
      if (lane == c) mine = absmax[c];
    }
    mine = __fdiv_rn(127.0f, mine);
#pragma unroll
    for (int c = 0; c < C; ++c) scales[c] = __shfl_sync(~0u, mine, c);
  }
  int totals[C];
#pragma unroll
  for (int c = 0; c < C; ++c) {
    totals[c] = 0;
#pragma unroll
    for (int j = 0; j < Where::kEach; ++j) {
      float v[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) v[k] = z[c][j][k] * scales[c];
      const u32 four = rounded(v);
      totals[c] = __dp4a((int)four, 0x01010101, totals[c]);
      const int n = Where::group(j);
      if (Where::live(j)) q[c * Where::kPlanes + (n & 3) * Where::kPlane + (n >> 2)] = four;
    }
  }
  sync_workers();
#pragma unroll
  for (int c = 0; c < C; ++c) {
    totals[c] = __reduce_add_sync(~0u, totals[c]);
    if (lane == 0) s.sum_q[c][warp] = totals[c];
  }
}
// The sum of the int8 values of linear c, for a whole warp.
__device__ __forceinline__ int sum_of_q(const Reduction& s, int c) {
  const int lane = threadIdx.x & 31;
  return __reduce_add_sync(~0u, lane < kWarps ? s.sum_q[c][lane] : 0);
}
