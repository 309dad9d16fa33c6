// One token of one sequence through a whole MatMul-free model, in one launch.
//
// One block of threads per multiprocessor stays for the whole token; block b owns the same rows of
// every matrix in every layer, so the residual rows and the state never move. A layer has four
// phases (i/f/g, o, gate/up, down). What a phase makes, every block needs whole in the next one: it
// travels through device memory in words that are NaNs of one kind until they are written, so that
// data and "it is there" are the same word and no barrier, fence or counter is needed. There are
// three sets of these words; layers take turns with them. A block that has a layer's g whole knows
// that all blocks are done with the layer before, and takes its own words of that back.
//
// One more warp copies weights and norm weights into shared memory a whole phase ahead, right after
// a phase has what it waited for: they stream while the block computes, and the exchange finds the
// way to L2 empty. On Hopper the copy engine does it, a row or a vector an instruction.
//
// Defined by the host: D, M (0: no channel mixer), V, L, RBD, RBM (bytes of a packed row), BLOCKS,
// EMBEDDING (0 bf16, 1 int8, 2 f32), THREADS (without the warp that copies), SHARED_LIMIT (bytes a
// block may have), NORM_EPS, LINEAR_EPS, GATE_EPS, LEAST_EPS.

#include "decode_copies.cuh"

struct Worker {
  const Params& p;
  Shared& s;
  Copies& copies;
  int* parts;   // of sums, that products leave
  u32* items;   // the set of this layer
  int channel;  // that this thread finishes, where it is `mine`
  bool mine;
  float x;  // its residual
  VectorD::Mine vectors[2];
  u32 phases = 0;  // behind us

  // The phase's norm weights are here, and there is room for copies of the next one.
  __device__ __forceinline__ void taken() {
    wait_for_copies(&s.norms[phases & 1], phases >> 1 & 1);
    arrive_only(kTaken, kThreads + 32);
  }
  template <class Product>
  __device__ __forceinline__ void multiply(const u32* q, const u8* weights, const u8* held) {
    wait_for_copies(&s.rows[phases & 1], phases >> 1 & 1);
    Product::run(q, parts, weights, held);
  }
  template <class Product>
  __device__ __forceinline__ float product(int part, int row, int sum_q, float scale) {
    return (float)(Product::total(parts, part, row) - sum_q) * scale;
  }
  // i, f, g and the state
  __device__ __forceinline__ void recur(int layer, float h_old, float bound) {
    const float* w_scale = s.w_scale + 6 * layer;
    STAMP(s.reduction, 3);
    normalise<VectorD>(vectors[0], copies.even_norms, NORM_EPS, s.reduction);
    STAMP(s.reduction, 4);
    float absmax[3];
    quantise<3, VectorD>(vectors[0], copies.even_norms + VectorD::kPad, s.q_d, absmax, s.reduction,
                         p.flag);
    STAMP(s.reduction, 6);
    multiply<ProductI>(s.q_d, Weights(p, layer).i, copies.even);
    STAMP(s.reduction, 7);
    if (threadIdx.x >= ceil_div(kOwnD, 32) * 32) return;
    const int sum_i = sum_of_q(s.reduction, 0), sum_f = sum_of_q(s.reduction, 1),
              sum_g = sum_of_q(s.reduction, 2);
    if (!mine) return;
    const int row = threadIdx.x;
    const float i = product<ProductI>(0, row, sum_i, w_scale[0] * __fdiv_rn(absmax[0], 127.0f));
    const float f = product<ProductI>(1, row, sum_f, w_scale[1] * __fdiv_rn(absmax[1], 127.0f));
    const float g = product<ProductI>(2, row, sum_g, w_scale[2] * __fdiv_rn(absmax[2], 127.0f));
    publish(items + kAtG, channel, g);
    const float forget = bound + (1.0f - bound) * sigmoid(f);
    const float input = silu(i) * (1.0f - forget);
    const float h = forget * h_old + input;
    publish(items + kAtG + VectorD::kPad, channel, silu(h));
    p.state_out[layer * D + channel] = h;
  }
  // The residual and the product behind a norm of `y`; published at `to`.
  template <class Product, class Where>
  __device__ __forceinline__ void add(const typename Where::Mine& y, const float* norm, u32* q,
                                      const u8* weights, float w_scale, u32* to) {
    float absmax[1];
    quantise<1, Where>(y, norm, q, absmax, s.reduction, p.flag);
    STAMP(s.reduction, 6);
    multiply<Product>(q, weights, copies.odd);
    STAMP(s.reduction, 7);
    if (threadIdx.x >= ceil_div(kOwnD, 32) * 32) return;
    const int sum_q = sum_of_q(s.reduction, 0);
    if (!mine) return;
    x = x + product<Product>(0, threadIdx.x, sum_q, w_scale * __fdiv_rn(absmax[0], 127.0f));
    publish(to, channel, x);
  }
  __device__ __forceinline__ void mix(int layer) {  // o
    const float w_scale = s.w_scale[6 * layer + 3];
    STAMP(s.reduction, 3);
    normalise<VectorD>(vectors[0], copies.odd_norms, GATE_EPS, s.reduction);
    STAMP(s.reduction, 4);
#pragma unroll
    for (int j = 0; j < VectorD::kEach; ++j)
#pragma unroll
      for (int k = 0; k < 4; ++k) vectors[0][j][k] = vectors[0][j][k] * vectors[1][j][k];
    add<ProductO, VectorD>(vectors[0], copies.odd_norms + VectorD::kPad, s.q_d, Weights(p, layer).o,
                           w_scale, items + kAtX);
  }
#if M > 0
  __device__ __forceinline__ void widen(int layer) {  // gate and up
    const float w_scale = s.w_scale[6 * layer + 4];
    STAMP(s.reduction, 3);
    normalise<VectorD>(vectors[0], copies.even_norms, NORM_EPS, s.reduction);
    STAMP(s.reduction, 4);
    float absmax[1];
    quantise<1, VectorD>(vectors[0], copies.even_norms + VectorD::kPad, s.q_d, absmax, s.reduction,
                         p.flag);
    STAMP(s.reduction, 6);
    multiply<ProductG>(s.q_d, Weights(p, layer).gate, copies.even);
    STAMP(s.reduction, 7);
    if (threadIdx.x >= ceil_div(kOwnM, 32) * 32) return;
    const int sum_q = sum_of_q(s.reduction, 0), row = threadIdx.x, inner = blockIdx.x * kOwnM + row;
    if (row >= kOwnM || inner >= M) return;
    const float gate = product<ProductG>(0, row, sum_q, w_scale * __fdiv_rn(absmax[0], 127.0f));
    const float up = product<ProductG>(1, row, sum_q, w_scale * __fdiv_rn(absmax[0], 127.0f));
    publish(items + kAtY, inner, silu(gate) * up);
  }
  __device__ __forceinline__ void narrow(int layer) {  // down
    const float w_scale = s.w_scale[6 * layer + 5];
    VectorM::Mine wide[1];
    gather<VectorM, 1>(items + kAtY, wide, s.reduction);
    STAMP_GATHERED(s.reduction);
    taken();
    STAMP(s.reduction, 3);
    STAMP(s.reduction, 4);
    add<ProductD, VectorM>(wide[0], copies.odd_norms, s.q_m, Weights(p, layer).down, w_scale,
                           items + kAtNext);
  }
#endif
  // final norm, head, likeliest token
  __device__ __forceinline__ void choose() {
    STAMP(s.reduction, 3);
    normalise<VectorD>(vectors[0], copies.even_norms, NORM_EPS, s.reduction);
    STAMP(s.reduction, 4);
    float absmax[1];
    quantise<1, VectorD>(vectors[0], copies.even_norms + VectorD::kPad, s.q_d, absmax, s.reduction,
                         p.flag);
    STAMP(s.reduction, 6);
    multiply<ProductH>(s.q_d, p.head, copies.even);
    STAMP(s.reduction, 7);
    const int sum_q = sum_of_q(s.reduction, 0);
    u64 best = 0;
    for (int n = threadIdx.x; n < kOwnV; n += kThreads) {
      const int row = blockIdx.x * kOwnV + n;
      if (row >= V) break;
      const float logit =
          product<ProductH>(0, n, sum_q, s.w_scale[6 * L] * __fdiv_rn(absmax[0], 127.0f));
      p.logits[row] = logit;
      const u32 bits = __float_as_uint(logit + 0.0f);
      const u32 order = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
      const u64 key = (u64)order << 32 | (0xffffffffu - row);  // of equal ones the lowest row
      best = key > best ? key : best;
    }
#pragma unroll
    for (int step = 16; step > 0; step >>= 1) {
      const u64 other = __shfl_xor_sync(~0u, best, step);
      best = other > best ? other : best;
    }
    if ((threadIdx.x & 31) == 0 && best) atomicMax(p.best, best);
    sync_workers();
    if (threadIdx.x == 0) {
      if (s.reduction.dead) *p.flag = 2;
      __threadfence();
      if (atomicAdd(p.arrived, 1u) == BLOCKS - 1) {
        __threadfence();
        const u64 all = atomicExch(p.best, 0ull);
        *p.token_out = (int)(0xffffffffu - (u32)all);
        *p.arrived = 0;
      }
    }
  }
  template <int P>
  __device__ __forceinline__ void take(const u32* from) {
    gather<VectorD, P>(from, vectors, s.reduction);
    STAMP_GATHERED(s.reduction);
    taken();
  }
  __device__ __forceinline__ void run(int token) {
#pragma unroll
    for (int j = 0; j < VectorD::kEach; ++j)
#pragma unroll
      for (int b = 0; b < 4; ++b) {
        const int e = VectorD::element(j, b);
        vectors[0][j][b] = VectorD::live(j) && e < D ? embedded(p, token, e) : 0.0f;
      }
    int set = p.set;
#pragma unroll 1
    for (int layer = 0; layer < L; ++layer) {
      const u32* before = layer > 0 ? items + kAtNext : nullptr;
      items = p.items + set * kSet;
      set = set + 1 == kSets ? 0 : set + 1;
      STAMP(s.reduction, 0);
      const float h_old = mine ? load_now(p.state_in + layer * D + channel) : 0.0f;
      const float bound = mine ? load_now(p.bound + layer * D + channel) : 0.0f;
      if (layer > 0)
        take<1>(before);
      else
        taken();
      recur(layer, h_old, bound);
      next_phase();
      take<2>(items + kAtG);
      mix(layer);
      next_phase();
#if M > 0
      take<1>(items + kAtX);
      widen(layer);
      next_phase();
      narrow(layer);
      next_phase();
#endif
    }
    take<1>(items + kAtNext);
    choose();
    STAMP(s.reduction, 8);
  }
  __device__ __forceinline__ void next_phase() {
    STAMP(s.reduction, 8);
    ++phases;
    STAMP_PHASE(s.reduction, phases);
    STAMP(s.reduction, 0);
  }
};

extern "C" __global__ void __launch_bounds__(kThreads + 32, 1) decode(const Params p) {
  SHARED_MEMORY(memory);
  Shared& s = *reinterpret_cast<Shared*>(memory);
  Copies& copies = *reinterpret_cast<Copies*>(memory + kSmall);
  for (int n = threadIdx.x; n < (int)(sizeof(Shared) / 4); n += kThreads + 32)
    reinterpret_cast<u32*>(memory)[n] = 0;
  __syncthreads();
  for (int n = threadIdx.x; n < 6 * L + 1; n += kThreads + 32) s.w_scale[n] = p.w_scale[n];
  if (threadIdx.x < 2) start_barrier(&s.norms[threadIdx.x]), start_barrier(&s.rows[threadIdx.x]);
  __syncthreads();
  if (threadIdx.x >= kThreads) {
    Server{p, s, copies}.run();
    return;
  }
  const int token = p.token >= 0 ? p.token : *p.token_in;
  Worker worker{p, s, copies, reinterpret_cast<int*>(memory + kSmall + sizeof(Copies))};
  worker.channel = blockIdx.x * kOwnD + threadIdx.x;
  worker.mine = threadIdx.x < kOwnD && worker.channel < D;
  worker.x = worker.mine ? embedded(p, token, worker.channel) : 0.0f;
  worker.run(token);
}
