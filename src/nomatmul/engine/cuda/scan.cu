// MLGRU's recurrence h_t = f_t * h_(t-1) + i_t over stretches of tokens, one step after the other: any
// other order would round differently from decoding. One warp takes 32 channels of a stretch; copies
// into shared memory run kStages * kSteps steps ahead, for with so few threads only a long queue of
// loads keeps the memory busy. A thread reads only what it has copied itself, so nothing is waited
// for but its own copies. h replaces i.

constexpr int kSteps = 32, kStages = 8;

__device__ __forceinline__ void copy4(float* to, const float* from) {
  const unsigned at = (unsigned)__cvta_generic_to_shared(to);
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" :: "r"(at), "l"(from) : "memory");
}

extern "C" __constant__ int shared_bytes = kStages * kSteps * 2 * 32 * 4;

extern "C" __global__ void __launch_bounds__(32) scan(
    float* i_TD, const float* f_TD, float* states, const int* sequences, const int* starts,
    long long state_stride, int channels) {
  extern __shared__ float memory[];  // [stage][step][i, f][lane]
  const int channel = blockIdx.x * 32 + threadIdx.x;
  const int first = starts[blockIdx.y], count = starts[blockIdx.y + 1] - first;
  if (channel >= channels || count < 1) return;
  const size_t base = (size_t)first * channels + channel;
  const float* f = f_TD + base;
  float* h = i_TD + base;
  float* place = states + sequences[blockIdx.y] * state_stride + channel;
  float* mine = memory + threadIdx.x;
  float state = *place;

  const auto fill = [&](int stage) {
    float* to = mine + (stage % kStages) * kSteps * 64;
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      const int t = min(stage * kSteps + k, count - 1);
      copy4(to + k * 64, h + (size_t)t * channels);
      copy4(to + k * 64 + 32, f + (size_t)t * channels);
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  };
  for (int stage = 0; stage < kStages - 1; ++stage) fill(stage);
  for (int stage = 0; stage * kSteps < count; ++stage) {
    asm volatile("cp.async.wait_group %0;" :: "n"(kStages - 2) : "memory");
    const float* from = mine + (stage % kStages) * kSteps * 64;
    float* to = h + (size_t)stage * kSteps * channels;
    if ((stage + 1) * kSteps <= count) {
      float decay[kSteps], input[kSteps];  // all read before the first step needs one
#pragma unroll
      for (int k = 0; k < kSteps; ++k) decay[k] = from[k * 64 + 32], input[k] = from[k * 64];
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        state = __fadd_rn(__fmul_rn(decay[k], state), input[k]);
        to[(size_t)k * channels] = state;
      }
    } else {
      for (int k = 0; stage * kSteps + k < count; ++k) {
        state = __fadd_rn(__fmul_rn(from[k * 64 + 32], state), from[k * 64]);
        to[(size_t)k * channels] = state;
      }
    }
    fill(stage + kStages - 1);
  }
  *place = state;
}
