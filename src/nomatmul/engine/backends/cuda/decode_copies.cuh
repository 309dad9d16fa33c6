// The warp of decode.cu that copies: weights a whole phase ahead, and words taken back.
#pragma once

#include "decode_layout.cuh"

struct Norm {
  const float* weights;
  int floats;
};

struct Server {
  const Params& p;
  Shared& s;
  Copies& copies;
  int lane = threadIdx.x & 31;

  // Until the threads that compute have what the phase waited for: the other buffer is free then.
  __device__ __forceinline__ void wait_until_taken() { sync_some(kTaken, kThreads + 32); }

  // What the next phase needs: its first norm, those of its linears, its weights.
  template <class Product>
  __device__ __forceinline__ void ahead(int odd, Norm block, Norm linears, const u8* weights) {
    float* norms = odd ? copies.odd_norms : copies.even_norms;
    __syncwarp();
    if (lane == 0) {
      expect(&s.norms[odd], 4 * (block.floats + linears.floats));
      if (block.floats) copy(norms, block.weights, 4 * block.floats, &s.norms[odd]);
      copy(norms + block.floats, linears.weights, 4 * linears.floats, &s.norms[odd]);
      expect(&s.rows[odd], Product::kAhead);
    }
    asked(&s.norms[odd]);
    __syncwarp();
    Product::ahead(weights, odd ? copies.odd : copies.even, &s.rows[odd]);
    asked(&s.rows[odd]);
  }
  __device__ __forceinline__ void start_layer(int layer) {  // or, behind the last one, the head
    constexpr int N = VectorD::kPad;
    if (layer < L)
      ahead<ProductI>(0, {p.mixer_norm + layer * N, N}, {p.ifg_norm + layer * 3 * N, 3 * N},
                      Weights(p, layer).i);
    else
      ahead<ProductH>(0, {p.final_norm, N}, {p.head_norm, N}, p.head);
  }
  // Calls weights of the phase after the next one into the second cache, where all that is read
  // passes through shared memory. (Larger models were slower with it.) phase: of a layer, 0 i/f/g.
  template <int phase>
  __device__ __forceinline__ void call_ahead(int layer) {
#if M > 0
    if (!kAllHeld) return;
    constexpr int then = (phase + 2) % 4, N = VectorD::kPad;
    layer += (phase + 2) / 4;
    if (layer >= L) {
      if (then == 0) ProductH::call(p.head);
      return;
    }
    const Weights weights(p, layer);
    if (then == 0) ProductI::call(weights.i);
    if (then == 1) ProductO::call(weights.o);
    if (then == 2) ProductG::call(weights.gate);
    if (then == 3) ProductD::call(weights.down);
    if (blockIdx.x != then || lane < 30) return;  // norm weights: one block is enough
    const bool first = lane == 30;
    if (then == 0 && first) prefetch(p.mixer_norm + layer * N, 4 * N);
    if (then == 0 && !first) prefetch(p.ifg_norm + layer * 3 * N, 12 * N);
    if (then == 1) prefetch((first ? p.g_norm : p.o_norm) + layer * N, 4 * N);
    if (then == 2) prefetch((first ? p.channel_norm : p.gate_norm) + layer * N, 4 * N);
    if (then == 3 && first) prefetch(p.down_norm + layer * VectorM::kPad, 4 * VectorM::kPad);
#endif
  }
  // This block's words of a set are absent again. Seen by all before it writes there: two layers
  // on, and what it writes before comes behind a copy that is asked for after this.
  __device__ __forceinline__ void take_back(u32* items) {
    for (int n = lane; n < kOwnD; n += 32) {
      const int e = blockIdx.x * kOwnD + n;
      if (e >= D) break;
#pragma unroll
      for (int vector = 0; vector < 4; ++vector)
        write_item(items + vector * VectorD::kPad + place_of(e), kAbsent);
    }
    for (int n = lane; n < kOwnM; n += 32) {
      const int e = blockIdx.x * kOwnM + n;
      if (e < M) write_item(items + kAtY + place_of(e), kAbsent);
    }
    __threadfence();
  }
  __device__ __forceinline__ void run() {
    constexpr int N = VectorD::kPad;
    int last = p.set == 0 ? kSets - 1 : p.set - 1;  // the set of the layer before
    start_layer(0);
#pragma unroll 1
    for (int layer = 0; layer < L; ++layer) {
      wait_until_taken();
      ahead<ProductO>(1, {p.g_norm + layer * N, N}, {p.o_norm + layer * N, N}, Weights(p, layer).o);
      call_ahead<0>(layer);
      wait_until_taken();
#if M > 0
      ahead<ProductG>(0, {p.channel_norm + layer * N, N}, {p.gate_norm + layer * N, N},
                      Weights(p, layer).gate);
#else
      start_layer(layer + 1);
#endif
      call_ahead<1>(layer);
      take_back(p.items + last * kSet);
      last = last + 1 == kSets ? 0 : last + 1;
#if M > 0
      wait_until_taken();
      ahead<ProductD>(1, {nullptr, 0}, {p.down_norm + layer * VectorM::kPad, VectorM::kPad},
                      Weights(p, layer).down);
      call_ahead<2>(layer);
      wait_until_taken();
      start_layer(layer + 1);
      call_ahead<3>(layer);
#endif
    }
  }
};
