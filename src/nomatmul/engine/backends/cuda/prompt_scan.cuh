// MLGRU's gates and recurrence over a block of tokens, a part of prompt.cu.
#pragma once

#include "float_steps.cuh"

#ifndef NOMATMUL_EMULATED
__device__ __forceinline__ float reciprocal(float x) {  // within an ulp
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
#endif

// Gates and recurrence h_t = f_t * h_(t-1) + i_t of the accumulators of i and f, in order: any other
// order of the steps would round differently from decoding. A block takes kChannels channels of a
// stretch of tokens. Warp 0 walks through time; the other warps make the gates of the next kSteps
// steps meanwhile, from accumulators that they asked for a round before. h replaces the accumulators
// of i; rows behind the last stretch get zeros.
constexpr int kChannels = 8, kWorkers = 32 * kChannels, kPer = 4, kSteps = kPer * 32;

// 1 / (1 + e^-x) where that is no denormal number: a Newton step makes the reciprocal exact.
__device__ __forceinline__ float near_sigmoid(float x) {
  const float e = 1.0f + exp_poly(-(x > 88.0f ? 88.0f : x)), guess = reciprocal(e);
  return __fmaf_rn(__fmaf_rn(-e, guess, 1.0f), guess, guess);
}

extern "C" __global__ void __launch_bounds__(32 + kWorkers)
    scan(int* i_TD, const int* f_TD, const float* steps, float w_scale_i, float w_scale_f,
         const float* bounds, float* states, const int* sequences, const int* starts,
         int state_stride, int tokens) {
  __shared__ float2 made[2][kSteps][kChannels];
  const bool walks = threadIdx.x < 32;
  const int worker = walks ? threadIdx.x : threadIdx.x - 32;
  const int lane = worker % kChannels, first = worker / kChannels;
  const int channel = blockIdx.x * kChannels + lane;
  const bool live = channel < D && (!walks || worker < kChannels);
  const int begin = starts[blockIdx.y], count = starts[blockIdx.y + 1] - begin;
  const size_t base = (size_t)begin * D + channel;
  float* h = reinterpret_cast<float*>(i_TD) + base;
  float* place = states + (size_t)sequences[blockIdx.y] * state_stride + channel;
  float state = walks && live ? *place : 0.0f;
  const float bound = !walks && live ? bounds[channel] : 0.0f;

  int acc_i[kPer] = {}, acc_f[kPer] = {};
  float step_i[kPer] = {}, step_f[kPer] = {};
  const auto ask = [&](int tile) {
#pragma unroll
    for (int n = 0; n < kPer; ++n) {
      const int t = tile * kSteps + first + 32 * n;
      if (live && t < count) {
        acc_i[n] = i_TD[base + (size_t)t * D], acc_f[n] = f_TD[base + (size_t)t * D];
        step_i[n] = steps[begin + t], step_f[n] = steps[tokens + begin + t];
      }
    }
  };
  if (!walks) ask(0);
  const int tiles = ceil_div(count, kSteps);
  for (int tile = 0; tile <= tiles; ++tile) {
    if (!walks && tile < tiles) {
      float i[kPer], f[kPer];
      bool near = true;
#pragma unroll
      for (int n = 0; n < kPer; ++n) {
        i[n] = (float)acc_i[n] * (w_scale_i * step_i[n]), f[n] = (float)acc_f[n] * (w_scale_f * step_f[n]);
        near = near && i[n] > -87.0f && f[n] > -87.0f;
      }
      ask(tile + 1);
      float2 out[kPer];
#pragma unroll
      for (int n = 0; n < kPer; ++n) {
        const float forget = bound + (1.0f - bound) * near_sigmoid(f[n]);
        out[n] = make_float2(forget, i[n] * near_sigmoid(i[n]) * (1.0f - forget));
      }
      if (!near)
        for (int n = 0; n < kPer; ++n) {
          const float forget = bound + (1.0f - bound) * sigmoid(f[n]);
          out[n] = make_float2(forget, silu(i[n]) * (1.0f - forget));
        }
#pragma unroll
      for (int n = 0; n < kPer; ++n) made[tile & 1][first + 32 * n][lane] = out[n];
    } else if (walks && tile > 0 && live) {
      const float2(*from)[kChannels] = made[(tile - 1) & 1];
      float* to = h + (size_t)(tile - 1) * kSteps * D;
      const int left = min(count - (tile - 1) * kSteps, kSteps);
      int t = 0;
      for (; t + 16 <= left; t += 16) {
        float2 both[16];  // all read before the first step needs one
#pragma unroll
        for (int k = 0; k < 16; ++k) both[k] = from[t + k][lane];
#pragma unroll
        for (int k = 0; k < 16; ++k) {
          state = both[k].x * state + both[k].y;
          to[(size_t)(t + k) * D] = state;
        }
      }
      for (; t < left; ++t) {
        state = from[t][lane].x * state + from[t][lane].y;
        to[(size_t)t * D] = state;
      }
    }
    __syncthreads();
  }
  if (walks && live && count > 0) *place = state;
  if (blockIdx.y + 1 == gridDim.y && !walks && live)
    for (int t = count + first; begin + t < tokens; t += 32) h[(size_t)t * D] = 0.0f;
}
