// One token of one sequence through a whole MatMul-free model, in one launch.
//
// One block of threads per multiprocessor stays for the whole token; block b owns the same rows of
// every matrix in every layer, so the residual rows and the state never move. A layer has four
// phases (i/f/g, o, gate/up, down). What a phase makes, every block needs whole in the next one: it
// travels through device memory in 16-byte items {three floats, number of the phase}, written and
// read as one access each, so that data and "it is there" are the same word and no barrier, fence or
// counter is needed. An item is overwritten two phases later at the earliest: a block that writes
// phase n has read all of n - 1, whose writers had read all of n - 2.
//
// Weights are loaded into registers BEFORE a phase waits for its input, so memory streams while the
// blocks exchange. The product runs on the int8 matrix unit: A = 16 weight rows, a packed word masked
// to one of its four planes, not shifted (plane p then counts 4^p fold, and four accumulators keep
// the planes apart until the end); B = activations, one column for each linear that shares the input.
//
// Float steps are those of csrc/kernels/float_ops.h, operation by operation (compile with
// --fmad=false), so results have the bits of the native core and of the triton path.
//
// Defined by the host: D, M (0: no channel mixer), V, L, RBD, RBM (bytes of a packed row), BLOCKS,
// EMBEDDING (0 bf16, 1 int8, 2 f32), NORM_EPS, LINEAR_EPS, GATE_EPS.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned char u8;

constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr int kAhead = 5;           // units of weights (32 bytes a thread) loaded ahead of a product
constexpr int kRun = 30;            // channels that one warp finishes: ten items of three
constexpr u32 kPatience = 1u << 21; // polls before a block gives up, about a second

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int largest(int a, int b) { return a > b ? a : b; }

constexpr int kOwnD = ceil_div(D, BLOCKS), kOwnM = ceil_div(M, BLOCKS), kOwnV = ceil_div(V, BLOCKS);
constexpr int kItemsD = ceil_div(kOwnD, 3), kItemsM = ceil_div(kOwnM, 3);
constexpr int kMostRows = largest(largest(3 * kOwnD, 2 * kOwnM), kOwnV);
constexpr int kAccs = ceil_div(kMostRows, 16) * 16;
constexpr int kPlaneD = RBD / 4 + 4, kPlaneM = RBM / 4 + 4;  // words; the 4 spread the banks

struct Item { float a, b, c; u32 phase; };

struct Params {
  const u8 *embedding; const float* embedding_scale;
  const u8 *ifg, *o, *gate, *down, *head;
  const float *mixer_norm, *ifg_norm, *g_norm, *o_norm, *bound, *channel_norm, *gate_norm, *down_norm;
  const float *final_norm, *head_norm;
  const float* beta;  // [L][6] of i, f, g, o, gate, down; then the head's
  const float* state_in; float* state_out;
  float* logits;
  const int* token_in; int* token_out;
  Item *items_x, *items_g, *items_s, *items_y;
  u64* best; u32* arrived; int* flag;
  u32 phase;  // items written so far: a phase's number never comes twice (in 32 bits)
  int token;  // the token, or -1: it is what *token_in holds (the launch before made it)
};

struct Shared {
  float values[largest(2 * kOwnD * BLOCKS, kOwnM * BLOCKS)];
  u32 q_d[3 * 4 * kPlaneD];
  u32 q_m[M ? 4 * kPlaneM : 4];
  int acc[2][kAccs];
  int sum_q[2][4];
  double sums[2][kWarps];
  u32 tops[3][kWarps];
  int dead;
};

__device__ __forceinline__ float exp_poly(float x) {
  const float shifter = 12582912.0f;
  const float biased = x * 1.44269504088896341f + shifter;
  const float n = biased - shifter;
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
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
  const float s = __fdiv_rn(1.0f, 1.0f + exp_poly(-y));
  return x < -88.0f ? 0.0f : s;
}
__device__ __forceinline__ float silu(float x) { return x * sigmoid(x); }

__device__ __forceinline__ void write_item(Item* at, float a, float b, float c, u32 phase) {
  const u64 low = (u64)__float_as_uint(b) << 32 | __float_as_uint(a);
  const u64 high = (u64)phase << 32 | __float_as_uint(c);
  asm volatile("{ .reg .b128 v; mov.b128 v, {%1, %2}; st.relaxed.gpu.global.b128 [%0], v; }"
               :: "l"(at), "l"(low), "l"(high) : "memory");
}
__device__ __forceinline__ void read_item(const Item* at, u64& low, u64& high) {
  asm volatile("{ .reg .b128 v; ld.relaxed.gpu.global.b128 v, [%2]; mov.b128 {%0, %1}, v; }"
               : "=l"(low), "=l"(high) : "l"(at) : "memory");
}

// Waits for all items of a phase and lays their floats out as a vector in shared memory.
template <int kOwn, int kItems>
__device__ __forceinline__ void gather(const Item* items, u32 phase, float* out, Shared& s) {
  constexpr int kAll = kItems * BLOCKS, kEach = ceil_div(kAll, kThreads);
  u64 low[kEach], high[kEach];
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    const int n = threadIdx.x + j * kThreads;
    if (n < kAll) read_item(items + n, low[j], high[j]);
  }
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    const int n = threadIdx.x + j * kThreads;
    if (n >= kAll) continue;
    for (u32 polls = 0; (u32)(high[j] >> 32) != phase; ++polls) {
      if (polls > kPatience || *(volatile int*)&s.dead) { *(volatile int*)&s.dead = 1; break; }
      read_item(items + n, low[j], high[j]);
    }
    const int owner = n / kItems, first = 3 * (n % kItems);
    float* place = out + owner * kOwn + first;
    place[0] = __uint_as_float((u32)low[j]);
    if (first + 1 < kOwn) place[1] = __uint_as_float((u32)(low[j] >> 32));
    if (first + 2 < kOwn) place[2] = __uint_as_float((u32)high[j]);
  }
}

// A warp's lanes 0..29 hold channels run * 30 + lane of this block; their items go out.
template <int kOwn, int kItems>
__device__ __forceinline__ void publish(Item* items, float value, int run, u32 phase) {
  const int lane = threadIdx.x & 31, from = lane < 10 ? 3 * lane : 0;
  const float a = __shfl_sync(~0u, value, from);
  const float b = __shfl_sync(~0u, value, from + 1);
  const float c = __shfl_sync(~0u, value, from + 2);
  const int item = run * 10 + lane;
  if (lane < 10 && item < kItems) write_item(items + blockIdx.x * kItems + item, a, b, c, phase);
}

// sqrt(mean + eps) of a sum of squares; every thread gets it. One barrier.
__device__ __forceinline__ float root_of(double sum, int size, float eps, double* sums) {
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int step = 16; step > 0; step >>= 1) sum += __shfl_xor_sync(~0u, sum, step);
  if (lane == 0) sums[threadIdx.x >> 5] = sum;
  __syncthreads();
  sum = sums[lane % kWarps];
#pragma unroll
  for (int step = kWarps / 2; step > 0; step >>= 1) sum += __shfl_xor_sync(~0u, sum, step);
  const float mean = (float)__ddiv_rn(sum, (double)size);
  return __fsqrt_rn(mean + eps);
}

__device__ __forceinline__ double square(float x) { return (double)__fmul_rn(x, x); }

// Norm weights of C linears, in registers before the input is there.
template <int K, int C>
struct Norms {
  static constexpr int kEach = ceil_div(K, kThreads);
  float w[C][kEach];
  __device__ __forceinline__ void load(const float* from) {
#pragma unroll
    for (int c = 0; c < C; ++c)
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        const int e = threadIdx.x + j * kThreads;
        w[c][j] = e < K ? __ldg(from + c * K + e) : 0.0f;
      }
  }
};

// int8 values, by planes, of the norm of y for each of C linears. Three barriers with root_of's.
template <int K, int C, int kPlane>
__device__ __forceinline__ void quantise(const float (&y)[ceil_div(K, kThreads)],
                                         const Norms<K, C>& norms, u32* q, float (&steps)[C],
                                         int parity, Shared& s, int* flag) {
  constexpr int kEach = ceil_div(K, kThreads);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  double sum = 0.0;
#pragma unroll
  for (int j = 0; j < kEach; ++j) sum += square(y[j]);
  const float root = root_of(sum, K, LINEAR_EPS, s.sums[1]);
  float base[kEach];
#pragma unroll
  for (int j = 0; j < kEach; ++j) base[j] = __fdiv_rn(y[j], root);
#pragma unroll
  for (int c = 0; c < C; ++c) {
    u32 top = 0;  // bits of |z| order as numbers do, infinity and NaN above all
#pragma unroll
    for (int j = 0; j < kEach; ++j)
      top = max(top, __float_as_uint(base[j] * norms.w[c][j]) & 0x7fffffffu);
    top = __reduce_max_sync(~0u, top);
    if (lane == 0) s.tops[c][warp] = top;
  }
  __syncthreads();
#pragma unroll
  for (int c = 0; c < C; ++c) {
    const u32 top = __reduce_max_sync(~0u, s.tops[c][lane % kWarps]);
    if (top >= 0x7f800000u && threadIdx.x == 0) *flag = 1;
    const float absmax = fmaxf(__uint_as_float(top), 1e-5f);
    const float scale = __fdiv_rn(127.0f, absmax);
    steps[c] = __fdiv_rn(absmax, 127.0f);
    int total = 0;
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const int e = threadIdx.x + j * kThreads;
      const float v = (base[j] * norms.w[c][j]) * scale;
      int whole = (int)v;
      const float part = v - (float)whole;
      whole += (part >= 0.5f) - (part <= -0.5f);
      whole = min(max(whole, -128), 127);
      if (e < K) {
        total += whole;
        u8* bytes = reinterpret_cast<u8*>(q + c * 4 * kPlane + (e & 3) * kPlane);
        bytes[(e >> 4) * 4 + ((e >> 2) & 3)] = (u8)whole;
      }
    }
    total = __reduce_add_sync(~0u, total);
    if (lane == 0) atomicAdd(&s.sum_q[parity][c], total);
  }
  // what the phase before left behind: its readers are past a barrier by now
  for (int n = threadIdx.x; n < kAccs; n += kThreads) s.acc[parity ^ 1][n] = 0;
  if (threadIdx.x < 4) s.sum_q[parity ^ 1][threadIdx.x] = 0;
  __syncthreads();
}

__device__ __forceinline__ uint4 load_weights(const u8* at) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(at));
  return v;
}

__device__ __forceinline__ void mma(int (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 "
               "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// acc[row] += sum_k code * q over this block's rows: `kParts` pieces of `kOwn` rows, piece c of
// `kStride` rows of the matrix. With C linears piece c meets column c, else all meet column 0.
// Work is cut into units of 16 rows x 64 bytes, dealt to the warps in stretches.
template <int kOwn, int kParts, int kStride, int RB, int C, int kPlane>
struct Product {
  static constexpr int kRows = kOwn * kParts, kTiles = ceil_div(kRows, 16), kSteps = RB / 64;
  static constexpr int kUnits = kTiles * kSteps, kMine = ceil_div(kUnits, kWarps);
  static constexpr int kHeld = kMine < kAhead ? kMine : kAhead;
  uint4 held[kHeld][2];
  const u8* weights;
  int first, end;

  __device__ __forceinline__ void load(int unit, uint4 (&to)[2]) const {
    const int lane = threadIdx.x & 31, tile = unit / kSteps, step = unit % kSteps;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = tile * 16 + half * 8 + (lane >> 2);
      const int part = row / kOwn, channel = blockIdx.x * kOwn + row % kOwn;
      to[half] = make_uint4(0, 0, 0, 0);
      if (unit < end && row < kRows && channel < kStride) {
        const size_t at = (size_t)(part * kStride + channel) * RB;
        to[half] = load_weights(weights + at + step * 64 + (lane & 3) * 16);
      }
    }
  }
  __device__ __forceinline__ void ahead(const u8* from) {
    const int warp = threadIdx.x >> 5;
    weights = from;
    first = warp * kUnits / kWarps;
    end = (warp + 1) * kUnits / kWarps;
#pragma unroll
    for (int n = 0; n < kHeld; ++n) load(first + n, held[n]);
  }
  __device__ __forceinline__ void flush(int (&c)[4][4], int tile, int* acc) const {
    const int lane = threadIdx.x & 31, t = lane & 3;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = tile * 16 + half * 8 + (lane >> 2);
      const int column = C == 1 ? 0 : row / kOwn;
      if (row < kRows && t == (column >> 1)) {
        int sum = 0;
#pragma unroll
        for (int p = 0; p < 4; ++p) sum += ((column & 1) ? c[p][2 * half + 1] : c[p][2 * half]) >> (2 * p);
        atomicAdd(acc + row, sum);
      }
    }
#pragma unroll
    for (int p = 0; p < 4; ++p)
#pragma unroll
      for (int k = 0; k < 4; ++k) c[p][k] = 0;
  }
  __device__ __forceinline__ void run(const u32* q, int* acc) {
    const int lane = threadIdx.x & 31, column = lane >> 2;
    const u32* mine = q + (column < C ? column : 0) * 4 * kPlane + (lane & 3) * 4;
    int c[4][4] = {};
    int tile = first / kSteps;
#pragma unroll
    for (int n = 0; n < kMine; ++n) {
      const int unit = first + n;
      if (unit < end) {
        if (unit / kSteps != tile) { flush(c, tile, acc); tile = unit / kSteps; }
        const uint4 w0 = held[n % kHeld][0], w1 = held[n % kHeld][1];
        if (n + kHeld < kMine) load(unit + kHeld, held[n % kHeld]);
        const u32* b = mine + (unit % kSteps) * 16;
#pragma unroll
        for (int p = 0; p < 4; ++p) {
          const u32 mask = 0x03030303u << (2 * p);
          const uint4 v = *reinterpret_cast<const uint4*>(b + p * kPlane);
          mma(c[p], w0.x & mask, w1.x & mask, w0.y & mask, w1.y & mask, v.x, v.y);
          mma(c[p], w0.z & mask, w1.z & mask, w0.w & mask, w1.w & mask, v.z, v.w);
        }
      }
    }
    if (first < end) flush(c, tile, acc);
    __syncthreads();
  }
};

__device__ __forceinline__ float embedded(const Params& p, int token, int e) {
  const size_t at = (size_t)token * D + e;
  if (EMBEDDING == 0) return __uint_as_float((u32)reinterpret_cast<const unsigned short*>(p.embedding)[at] << 16);
  if (EMBEDDING == 1) return (float)reinterpret_cast<const signed char*>(p.embedding)[at] * p.embedding_scale[token];
  return reinterpret_cast<const float*>(p.embedding)[at];
}

// y = norm(x) of the vector in shared memory.
template <int K>
__device__ __forceinline__ void normed(const float* x, const Norms<K, 1>& norm, float eps,
                                       float (&y)[ceil_div(K, kThreads)], Shared& s) {
  constexpr int kEach = ceil_div(K, kThreads);
  double sum = 0.0;
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    const int e = threadIdx.x + j * kThreads;
    y[j] = e < K ? x[e] : 0.0f;
    sum += square(y[j]);
  }
  const float root = root_of(sum, K, eps, s.sums[0]);
#pragma unroll
  for (int j = 0; j < kEach; ++j) y[j] = __fdiv_rn(y[j], root) * norm.w[0][j];
}

extern "C" __constant__ int shared_bytes = sizeof(Shared);

extern "C" __global__ void __launch_bounds__(kThreads, 1) decode(const Params p) {
  extern __shared__ __align__(16) char memory[];
  Shared& s = *reinterpret_cast<Shared*>(memory);
  constexpr int kEachD = ceil_div(D, kThreads);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  // the channel that this thread finishes, where it finishes one
  const int own = warp * kRun + lane, channel = blockIdx.x * kOwnD + own;
  const bool mine = lane < kRun && own < kOwnD && channel < D;
  for (int n = threadIdx.x; n < (int)(sizeof(Shared) / 4); n += kThreads) reinterpret_cast<u32*>(memory)[n] = 0;
  __syncthreads();

  const int token = p.token >= 0 ? p.token : *p.token_in;
  for (int e = threadIdx.x; e < D; e += kThreads) s.values[e] = embedded(p, token, e);
  float x = mine ? embedded(p, token, channel) : 0.0f;
  __syncthreads();

  u32 phase = p.phase;  // of the last items written; items of a token start behind it
  int parity = 0;
  float y[kEachD];
  for (int layer = 0; layer < L; ++layer) {
    const float* beta = p.beta + 6 * layer;
    {  // i, f, g and the state
      Product<kOwnD, 3, D, RBD, 3, kPlaneD> product;
      product.ahead(p.ifg + (size_t)layer * 3 * D * RBD);
      Norms<D, 1> block; block.load(p.mixer_norm + layer * D);
      Norms<D, 3> norms; norms.load(p.ifg_norm + layer * 3 * D);
      const float h_old = mine ? p.state_in[layer * D + channel] : 0.0f;
      const float bound = mine ? __ldg(p.bound + layer * D + channel) : 0.0f;
      if (layer > 0) { gather<kOwnD, kItemsD>(p.items_x, phase, s.values, s); __syncthreads(); }
      normed<D>(s.values, block, NORM_EPS, y, s);
      float steps[3];
      quantise<D, 3, kPlaneD>(y, norms, s.q_d, steps, parity, s, p.flag);
      product.run(s.q_d, s.acc[parity]);
      ++phase;
      if (warp * kRun < kOwnD) {
        float g = 0.0f, gate = 0.0f;
        if (mine) {
          const int* acc = s.acc[parity] + own;
          const int* sum_q = s.sum_q[parity];
          const float i = (float)(acc[0] - sum_q[0]) * (beta[0] * steps[0]);
          const float f = (float)(acc[kOwnD] - sum_q[1]) * (beta[1] * steps[1]);
          g = (float)(acc[2 * kOwnD] - sum_q[2]) * (beta[2] * steps[2]);
          const float forget = bound + (1.0f - bound) * sigmoid(f);
          const float input = silu(i) * (1.0f - forget);
          const float h = forget * h_old + input;
          p.state_out[layer * D + channel] = h;
          gate = silu(h);
        }
        publish<kOwnD, kItemsD>(p.items_g, g, warp, phase);
        publish<kOwnD, kItemsD>(p.items_s, gate, warp, phase);
      }
      parity ^= 1;
    }
    {  // o
      Product<kOwnD, 1, D, RBD, 1, kPlaneD> product;
      product.ahead(p.o + (size_t)layer * D * RBD);
      Norms<D, 1> block; block.load(p.g_norm + layer * D);
      Norms<D, 1> norms; norms.load(p.o_norm + layer * D);
      float* gates = s.values + kOwnD * BLOCKS;
      gather<kOwnD, kItemsD>(p.items_g, phase, s.values, s);
      gather<kOwnD, kItemsD>(p.items_s, phase, gates, s);
      __syncthreads();
      normed<D>(s.values, block, GATE_EPS, y, s);
#pragma unroll
      for (int j = 0; j < kEachD; ++j) {
        const int e = threadIdx.x + j * kThreads;
        y[j] = e < D ? y[j] * gates[e] : 0.0f;
      }
      float steps[1];
      quantise<D, 1, kPlaneD>(y, norms, s.q_d, steps, parity, s, p.flag);
      product.run(s.q_d, s.acc[parity]);
      ++phase;
      if (warp * kRun < kOwnD) {
        if (mine) x = x + (float)(s.acc[parity][own] - s.sum_q[parity][0]) * (beta[3] * steps[0]);
        publish<kOwnD, kItemsD>(p.items_x, x, warp, phase);
      }
      parity ^= 1;
    }
#if M > 0
    {  // gate and up
      Product<kOwnM, 2, M, RBD, 1, kPlaneD> product;
      product.ahead(p.gate + (size_t)layer * 2 * M * RBD);
      Norms<D, 1> block; block.load(p.channel_norm + layer * D);
      Norms<D, 1> norms; norms.load(p.gate_norm + layer * D);
      gather<kOwnD, kItemsD>(p.items_x, phase, s.values, s);
      __syncthreads();
      normed<D>(s.values, block, NORM_EPS, y, s);
      float steps[1];
      quantise<D, 1, kPlaneD>(y, norms, s.q_d, steps, parity, s, p.flag);
      product.run(s.q_d, s.acc[parity]);
      ++phase;
      if (warp * kRun < kOwnM) {
        float value = 0.0f;
        if (lane < kRun && own < kOwnM) {
          const float scale = beta[4] * steps[0];
          const int sum_q = s.sum_q[parity][0];
          const float gate = (float)(s.acc[parity][own] - sum_q) * scale;
          const float up = (float)(s.acc[parity][kOwnM + own] - sum_q) * scale;
          value = silu(gate) * up;
        }
        publish<kOwnM, kItemsM>(p.items_y, value, warp, phase);
      }
      parity ^= 1;
    }
    {  // down
      constexpr int kEachM = ceil_div(M, kThreads);
      Product<kOwnD, 1, D, RBM, 1, kPlaneM> product;
      product.ahead(p.down + (size_t)layer * D * RBM);
      Norms<M, 1> norms; norms.load(p.down_norm + layer * M);
      gather<kOwnM, kItemsM>(p.items_y, phase, s.values, s);
      __syncthreads();
      float inner[kEachM];
#pragma unroll
      for (int j = 0; j < kEachM; ++j) {
        const int e = threadIdx.x + j * kThreads;
        inner[j] = e < M ? s.values[e] : 0.0f;
      }
      float steps[1];
      quantise<M, 1, kPlaneM>(inner, norms, s.q_m, steps, parity, s, p.flag);
      product.run(s.q_m, s.acc[parity]);
      ++phase;
      if (warp * kRun < kOwnD) {
        if (mine) x = x + (float)(s.acc[parity][own] - s.sum_q[parity][0]) * (beta[5] * steps[0]);
        publish<kOwnD, kItemsD>(p.items_x, x, warp, phase);
      }
      parity ^= 1;
    }
#endif
  }
  // final norm, head, likeliest token
  Product<kOwnV, 1, V, RBD, 1, kPlaneD> product;
  product.ahead(p.head);
  Norms<D, 1> block; block.load(p.final_norm);
  Norms<D, 1> norms; norms.load(p.head_norm);
  gather<kOwnD, kItemsD>(p.items_x, phase, s.values, s);
  __syncthreads();
  normed<D>(s.values, block, NORM_EPS, y, s);
  float steps[1];
  quantise<D, 1, kPlaneD>(y, norms, s.q_d, steps, parity, s, p.flag);
  product.run(s.q_d, s.acc[parity]);
  u64 best = 0;
  for (int n = threadIdx.x; n < kOwnV; n += kThreads) {
    const int row = blockIdx.x * kOwnV + n;
    if (row >= V) break;
    const float logit = (float)(s.acc[parity][n] - s.sum_q[parity][0]) * (p.beta[6 * L] * steps[0]);
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
  if (lane == 0 && best) atomicMax(p.best, best);
  __syncthreads();
  if (threadIdx.x == 0) {
    if (s.dead) *p.flag = 2;
    __threadfence();
    if (atomicAdd(p.arrived, 1u) == BLOCKS - 1) {
      __threadfence();
      const u64 all = atomicExch(p.best, 0ull);
      *p.token_out = (int)(0xffffffffu - (u32)all);
      *p.arrived = 0;
    }
  }
}
