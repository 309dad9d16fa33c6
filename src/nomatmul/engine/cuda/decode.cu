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
// EMBEDDING (0 bf16, 1 int8, 2 f32), THREADS, NORM_EPS, LINEAR_EPS, GATE_EPS.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned char u8;

constexpr int kThreads = THREADS, kWarps = kThreads / 32;  // a power of two
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
  const float4 *mixer_norm, *ifg_norm, *g_norm, *o_norm; const float* bound;
  const float4 *channel_norm, *gate_norm, *down_norm, *final_norm, *head_norm;
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
  alignas(16) u32 q_d[3 * 4 * kPlaneD];
  alignas(16) u32 q_m[M ? 4 * kPlaneM : 4];
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

#ifdef NOMATMUL_EMULATED  // tests/engine/emulate_cuda.h has these for a CPU
#define SHARED_MEMORY(name) char* name = emulated_shared()
#else
#define SHARED_MEMORY(name) extern __shared__ __align__(16) char name[]

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
#endif

// Which elements of a vector a thread works on: items threadIdx.x + j * kThreads, three floats each,
// and at which byte of a plane's int8 values each belongs. Floats of an item that stand for no element
// are zero wherever items are made, and so are their norm weights; their bytes go to a spare word.
template <int kOwn, int kItems, int kSize, int kPlane>
struct Map {
  static constexpr int K = kSize, kAll = kItems * BLOCKS, kEach = ceil_div(kAll, kThreads);
  static constexpr int kPadded = kEach * kThreads, kStride = kPlane;
  int place[3 * kEach];
  static __device__ __forceinline__ int element(int j, int k) {  // or -1
    const int n = threadIdx.x + j * kThreads, owner = n / kItems, inside = 3 * (n - owner * kItems) + k;
    const int e = owner * kOwn + inside;
    return n < kAll && inside < kOwn && e < kSize ? e : -1;
  }
  __device__ __forceinline__ Map() {
#pragma unroll
    for (int j = 0; j < 3 * kEach; ++j) {
      const int e = element(j / 3, j % 3);
      place[j] = e < 0 ? 4 * (kPlane - 1) : (e & 3) * (4 * kPlane) + (e >> 4) * 4 + ((e >> 2) & 3);
    }
  }
};

// Waits for a phase's items of this thread.
template <class Where>
__device__ __forceinline__ void gather(const Item* items, u32 phase,
                                       float (&out)[3 * Where::kEach], Shared& s) {
  u64 low[Where::kEach], high[Where::kEach];
  const Item* mine = items + threadIdx.x;
#pragma unroll
  for (int j = 0; j < Where::kEach; ++j) {
    if (threadIdx.x + j * kThreads < Where::kAll) read_item(mine + j * kThreads, low[j], high[j]);
    else low[j] = 0, high[j] = (u64)phase << 32;
  }
#pragma unroll
  for (int j = 0; j < Where::kEach; ++j) {
    for (u32 polls = 0; (u32)(high[j] >> 32) != phase; ++polls) {
      if (polls > kPatience || *(volatile int*)&s.dead) { *(volatile int*)&s.dead = 1; break; }
      read_item(mine + j * kThreads, low[j], high[j]);
    }
    out[3 * j] = __uint_as_float((u32)low[j]);
    out[3 * j + 1] = __uint_as_float((u32)(low[j] >> 32));
    out[3 * j + 2] = __uint_as_float((u32)high[j]);
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
  const float mean = (float)(sum * (1.0 / size));  // the float is the quotient's but for ties
  return __fsqrt_rn(mean + eps);
}

// x / root, correctly rounded (Markstein: the reciprocal is, and the remainder is exact). Where x is
// too small for that, both forms end as the int8 value 0.
struct Divisor {
  float root, inverse;
  __device__ __forceinline__ explicit Divisor(float r) : root(r), inverse(__frcp_rn(r)) {}
  __device__ __forceinline__ float under(float x) const {
    const float near = x * inverse;
    return __fmaf_rn(__fmaf_rn(-near, root, x), inverse, near);
  }
};

__device__ __forceinline__ double square(float x) { return (double)__fmul_rn(x, x); }

// Norm weights of C linears, in registers before the input is there. They lie in memory as items do,
// {three floats, 0}, padded to whole rounds of the threads.
template <class Where, int C>
struct Norms {
  float w[C][3 * Where::kEach];
  __device__ __forceinline__ void load(const float4* from) {
#pragma unroll
    for (int c = 0; c < C; ++c)
#pragma unroll
      for (int j = 0; j < Where::kEach; ++j) {
        const float4 v = __ldg(from + c * Where::kPadded + j * kThreads + threadIdx.x);
        w[c][3 * j] = v.x, w[c][3 * j + 1] = v.y, w[c][3 * j + 2] = v.z;
      }
  }
};

// y becomes norm(y).
template <class Where>
__device__ __forceinline__ void normalise(float (&y)[3 * Where::kEach], const Norms<Where, 1>& norm,
                                          float eps, Shared& s) {
  double sum = 0.0;
#pragma unroll
  for (int j = 0; j < 3 * Where::kEach; ++j) sum += square(y[j]);
  const Divisor root(root_of(sum, Where::K, eps, s.sums[0]));
#pragma unroll
  for (int j = 0; j < 3 * Where::kEach; ++j) y[j] = root.under(y[j]) * norm.w[0][j];
}

// int8 values, by planes, of the norm of y for each of C linears.
template <int C, class Where>
__device__ __forceinline__ void quantise(const Where& map, float (&y)[3 * Where::kEach],
                                         const Norms<Where, C>& norms, u32* q, float (&steps)[C],
                                         int parity, Shared& s, int* flag) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  double sum = 0.0;
#pragma unroll
  for (int j = 0; j < 3 * Where::kEach; ++j) sum += square(y[j]);
  const Divisor root(root_of(sum, Where::K, LINEAR_EPS, s.sums[1]));
#pragma unroll
  for (int j = 0; j < 3 * Where::kEach; ++j) y[j] = root.under(y[j]);
#pragma unroll
  for (int c = 0; c < C; ++c) {
    u32 top = 0;  // bits of |z| order as numbers do, infinity and NaN above all
#pragma unroll
    for (int j = 0; j < 3 * Where::kEach; ++j)
      top = max(top, __float_as_uint(y[j] * norms.w[c][j]) & 0x7fffffffu);
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
    u8* bytes = reinterpret_cast<u8*>(q + c * 4 * Where::kStride);
#pragma unroll
    for (int j = 0; j < 3 * Where::kEach; ++j) {
      const float v = (y[j] * norms.w[c][j]) * scale;
      // half away from zero: with the float below 0.5, 0.49999997 stays 0 and 0.5 becomes 1
      const int whole = min((int)(v + copysignf(0.49999997f, v)), 127);
      total += whole;
      bytes[map.place[j]] = (u8)whole;
    }
    total = __reduce_add_sync(~0u, total);
    if (lane == 0) atomicAdd(&s.sum_q[parity][c], total);
  }
  // what the phase before left behind: its readers are past a barrier by now
  for (int n = threadIdx.x; n < kAccs; n += kThreads) s.acc[parity ^ 1][n] = 0;
  if (threadIdx.x < 4) s.sum_q[parity ^ 1][threadIdx.x] = 0;
  __syncthreads();
}

// acc[row] += sum_k code * q over this block's rows: `kParts` pieces of `kOwn` rows, piece c of
// `kStride` rows of the matrix. With C linears piece c meets column c, else all meet column 0.
// A unit of work is 16 rows x 64 bytes. Warps are dealt to tiles of 16 rows, kShare to each, and take
// turns along the row; where there are more tiles than warps they go around again. Rows beyond the
// last one repeat it and are dropped at the end: no load has a condition.
template <int kOwn, int kParts, int kStride, int RB, int C, int kPlane>
struct Product {
  static constexpr int kRows = kOwn * kParts, kTiles = ceil_div(kRows, 16), kSteps = RB / 64;
  static constexpr int kShare = kTiles < kWarps ? kWarps / kTiles : 1;
  static constexpr int kRounds = ceil_div(kTiles * kShare, kWarps), kTurns = ceil_div(kSteps, kShare);
  static constexpr int kHeld = kTurns < kAhead ? kTurns : kAhead;
  uint4 held[kHeld][2];
  const u8* at[2];
  int tile, slice;

  __device__ __forceinline__ void aim(const u8* weights, int round) {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    tile = warp / kShare + round * (kWarps / kShare);
    slice = warp % kShare;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = min(tile * 16 + half * 8 + (lane >> 2), kRows - 1), part = row / kOwn;
      const int channel = min((int)blockIdx.x * kOwn + row - part * kOwn, kStride - 1);
      at[half] = weights + (size_t)(part * kStride + channel) * RB + slice * 64 + (lane & 3) * 16;
    }
  }
  __device__ __forceinline__ void load(int turn, uint4 (&to)[2]) const {
    if ((turn + 1) * kShare <= kSteps || turn * kShare + slice < kSteps) {
      to[0] = load_weights(at[0] + turn * kShare * 64);
      to[1] = load_weights(at[1] + turn * kShare * 64);
    }
  }
  __device__ __forceinline__ void ahead(const u8* weights, int round = 0) {
    aim(weights, round);
    if (tile < kTiles) {
#pragma unroll
      for (int n = 0; n < kHeld; ++n) load(n, held[n]);
    }
  }
  __device__ __forceinline__ void run(const u32* q, int* acc, const u8* weights) {
    const int lane = threadIdx.x & 31, column = lane >> 2, t = lane & 3;
    for (int round = 0; round < kRounds; ++round) {
      if (round > 0) ahead(weights, round);
      if (tile < kTiles) {
        const u32* b = q + (column < C ? column : 0) * 4 * kPlane + t * 4 + slice * 16;
        int c[4][4] = {};
#pragma unroll
        for (int n = 0; n < kTurns; ++n) {
          if ((n + 1) * kShare <= kSteps || n * kShare + slice < kSteps) {
            const uint4 w0 = held[n % kHeld][0], w1 = held[n % kHeld][1];
            if (n + kHeld < kTurns) load(n + kHeld, held[n % kHeld]);
#pragma unroll
            for (int p = 0; p < 4; ++p) {
              const u32 mask = 0x03030303u << (2 * p);
              const uint4 v = *reinterpret_cast<const uint4*>(b + p * kPlane + n * kShare * 16);
              mma(c[p], w0.x & mask, w1.x & mask, w0.y & mask, w1.y & mask, v.x, v.y);
              mma(c[p], w0.z & mask, w1.z & mask, w0.w & mask, w1.w & mask, v.z, v.w);
            }
          }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = tile * 16 + half * 8 + (lane >> 2);
          const int wanted = C == 1 ? 0 : row / kOwn;
          if (row < kRows && t == (wanted >> 1)) {
            int sum = 0;
#pragma unroll
            for (int p = 0; p < 4; ++p)
              sum += (C > 1 && (wanted & 1) ? c[p][2 * half + 1] : c[p][2 * half]) >> (2 * p);
            atomicAdd(acc + row, sum);
          }
        }
      }
    }
    __syncthreads();
  }
};

__device__ __forceinline__ float embedded(const Params& p, int token, int e) {
  const size_t at = (size_t)token * D + e;
  if (EMBEDDING == 0) return __uint_as_float((u32)reinterpret_cast<const unsigned short*>(p.embedding)[at] << 16);
  if (EMBEDDING == 1) return (float)reinterpret_cast<const signed char*>(p.embedding)[at] * p.embedding_scale[token];
  return reinterpret_cast<const float*>(p.embedding)[at];
}

extern "C" __constant__ int shared_bytes = sizeof(Shared);

extern "C" __global__ void __launch_bounds__(kThreads, 1) decode(const Params p) {
  SHARED_MEMORY(memory);
  Shared& s = *reinterpret_cast<Shared*>(memory);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  // the channel that this thread finishes, where it finishes one
  const int own = warp * kRun + lane, channel = blockIdx.x * kOwnD + own;
  const bool mine = lane < kRun && own < kOwnD && channel < D;
  for (int n = threadIdx.x; n < (int)(sizeof(Shared) / 4); n += kThreads) reinterpret_cast<u32*>(memory)[n] = 0;
  __syncthreads();

  const int token = p.token >= 0 ? p.token : *p.token_in;
  float x = mine ? embedded(p, token, channel) : 0.0f;
  using MapD = Map<kOwnD, kItemsD, D, kPlaneD>;
  const MapD map;

  u32 phase = p.phase;  // of the last items written; items of a token start behind it
  int parity = 0;
  float y[3 * MapD::kEach];
#pragma unroll
  for (int j = 0; j < 3 * MapD::kEach; ++j) {
    const int e = MapD::element(j / 3, j % 3);
    y[j] = e < 0 ? 0.0f : embedded(p, token, e);
  }
  for (int layer = 0; layer < L; ++layer) {
    float beta[6];
#pragma unroll
    for (int n = 0; n < 6; ++n) beta[n] = __ldg(p.beta + 6 * layer + n);
    {  // i, f, g and the state
      Product<kOwnD, 3, D, RBD, 3, kPlaneD> product;
      const u8* const weights = p.ifg + (size_t)layer * 3 * D * RBD;
      Norms<MapD, 1> block; block.load(p.mixer_norm + layer * MapD::kPadded);
      Norms<MapD, 3> norms; norms.load(p.ifg_norm + layer * 3 * MapD::kPadded);
      product.ahead(weights);
      const float h_old = mine ? p.state_in[layer * D + channel] : 0.0f;
      const float bound = mine ? __ldg(p.bound + layer * D + channel) : 0.0f;
      if (layer > 0) gather<MapD>(p.items_x, phase, y, s);
      normalise<MapD>(y, block, NORM_EPS, s);
      float steps[3];
      quantise<3>(map, y, norms, s.q_d, steps, parity, s, p.flag);
      product.run(s.q_d, s.acc[parity], weights);
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
      const u8* const weights = p.o + (size_t)layer * D * RBD;
      Norms<MapD, 1> block; block.load(p.g_norm + layer * MapD::kPadded);
      Norms<MapD, 1> norms; norms.load(p.o_norm + layer * MapD::kPadded);
      product.ahead(weights);
      float gates[3 * MapD::kEach];
      gather<MapD>(p.items_g, phase, y, s);
      gather<MapD>(p.items_s, phase, gates, s);
      normalise<MapD>(y, block, GATE_EPS, s);
#pragma unroll
      for (int j = 0; j < 3 * MapD::kEach; ++j) y[j] = y[j] * gates[j];
      float steps[1];
      quantise<1>(map, y, norms, s.q_d, steps, parity, s, p.flag);
      product.run(s.q_d, s.acc[parity], weights);
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
      const u8* const weights = p.gate + (size_t)layer * 2 * M * RBD;
      Norms<MapD, 1> block; block.load(p.channel_norm + layer * MapD::kPadded);
      Norms<MapD, 1> norms; norms.load(p.gate_norm + layer * MapD::kPadded);
      product.ahead(weights);
      gather<MapD>(p.items_x, phase, y, s);
      normalise<MapD>(y, block, NORM_EPS, s);
      float steps[1];
      quantise<1>(map, y, norms, s.q_d, steps, parity, s, p.flag);
      product.run(s.q_d, s.acc[parity], weights);
      ++phase;
      if (warp * kRun < kOwnM) {
        float value = 0.0f;
        if (lane < kRun && own < kOwnM && blockIdx.x * kOwnM + own < M) {
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
      Product<kOwnD, 1, D, RBM, 1, kPlaneM> product;
      const u8* const weights = p.down + (size_t)layer * D * RBM;
      using MapM = Map<kOwnM, kItemsM, M, kPlaneM>;
      const MapM wide;
      Norms<MapM, 1> norms; norms.load(p.down_norm + layer * MapM::kPadded);
      product.ahead(weights);
      float inner[3 * MapM::kEach];
      gather<MapM>(p.items_y, phase, inner, s);
      float steps[1];
      quantise<1>(wide, inner, norms, s.q_m, steps, parity, s, p.flag);
      product.run(s.q_m, s.acc[parity], weights);
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
  const u8* const weights = p.head;
  Norms<MapD, 1> block; block.load(p.final_norm);
  Norms<MapD, 1> norms; norms.load(p.head_norm);
  product.ahead(weights);
  gather<MapD>(p.items_x, phase, y, s);
  normalise<MapD>(y, block, NORM_EPS, s);
  float steps[1];
  quantise<1>(map, y, norms, s.q_d, steps, parity, s, p.flag);
  product.run(s.q_d, s.acc[parity], weights);
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
