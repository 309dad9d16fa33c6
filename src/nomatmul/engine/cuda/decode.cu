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
// Weights are copied into shared memory a whole phase ahead, norm weights at the start of theirs, so
// memory streams while the blocks exchange and compute. A thread reads only what it has copied itself:
// nothing is waited for but its own copies, and registers hold none of it. The product runs on the int8 matrix unit: A = 16 weight rows, a packed word masked
// to one of its four planes, not shifted (plane p then counts 4^p fold, and four accumulators keep
// the planes apart until the end); B = activations, one column for each linear that shares the input.
//
// Float steps are those of csrc/kernels/float_ops.h, operation by operation (compile with
// --fmad=false), so results have the bits of the native core and of the triton path.
//
// Defined by the host: D, M (0: no channel mixer), V, L, RBD, RBM (bytes of a packed row), BLOCKS,
// EMBEDDING (0 bf16, 1 int8, 2 f32), THREADS, SHARED_LIMIT (bytes a block may have), NORM_EPS, LINEAR_EPS, GATE_EPS.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned char u8;

constexpr int kThreads = THREADS, kWarps = kThreads / 32;  // a power of two
constexpr int kMostAhead = 5;       // units of weights (32 bytes a thread) copied ahead of a product
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

__host__ __device__ constexpr int rounds_of(int items) { return ceil_div(items * BLOCKS, kThreads); }
// units of a product that fall to one warp (see Product)
__host__ __device__ constexpr int turns_of(int rows, int row_bytes) {
  return ceil_div(row_bytes / 64, ceil_div(rows, 16) < kWarps ? kWarps / ceil_div(rows, 16) : 1);
}
__host__ __device__ constexpr int least(int a, int b) { return a < b ? a : b; }
constexpr int kNormSlots = largest(4 * rounds_of(kItemsD), rounds_of(kItemsM));
constexpr int kEvenTurns = largest(largest(turns_of(3 * kOwnD, RBD), turns_of(kOwnV, RBD)),
                                   M ? turns_of(2 * kOwnM, RBD) : 1);
constexpr int kOddTurns = largest(turns_of(kOwnD, RBD), M ? turns_of(kOwnD, RBM) : 1);
constexpr int kSmall = ceil_div((int)sizeof(Shared), 16) * 16;
__host__ __device__ constexpr int bytes_with(int ahead) {
  const int units = least(kEvenTurns, ahead) + least(kOddTurns, ahead);
  return kSmall + (kNormSlots + 2 * units) * kThreads * 16;
}
__host__ __device__ constexpr int ahead_that_fits() {
  int ahead = kMostAhead;
  while (ahead > 0 && bytes_with(ahead) > SHARED_LIMIT) --ahead;
  return ahead;
}
constexpr int kAhead = ahead_that_fits();
static_assert(kAhead > 0, "this chip has too little shared memory for a model so wide");
static_assert(kOwnD <= kWarps * kRun && kOwnM <= kWarps * kRun,
              "this chip has too few multiprocessors for a model so wide");

// Copies on their way: norm weights of this phase, weights of even and of odd phases.
struct Slots {
  uint4 norms[kNormSlots][kThreads];
  uint4 even[2 * least(kEvenTurns, kAhead)][kThreads];
  uint4 odd[2 * least(kOddTurns, kAhead)][kThreads];
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
__device__ __forceinline__ void copy16(uint4* to, const void* from) {
  const u32 at = (u32)__cvta_generic_to_shared(to);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(at), "l"(from) : "memory");
}
__device__ __forceinline__ void end_of_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// All groups of copies but the latest are there.
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_group 1;" ::: "memory"); }
// The same number, in a form of which the compiler knows nothing: what follows from it is computed
// again in every layer, where otherwise it would be kept over all of them, and spilled.
__device__ __forceinline__ int fresh(int number) {
  asm volatile("" : "+r"(number));
  return number;
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
  static __device__ __forceinline__ int element(int thread, int j, int k) {  // or -1
    const int n = thread + j * kThreads, owner = n / kItems, inside = 3 * (n - owner * kItems) + k;
    const int e = owner * kOwn + inside;
    return n < kAll && inside < kOwn && e < kSize ? e : -1;
  }
  __device__ __forceinline__ Map() {
    const int thread = fresh(threadIdx.x);
#pragma unroll
    for (int j = 0; j < 3 * kEach; ++j) {
      const int e = element(thread, j / 3, j % 3);
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

// Norm weights of C linears, from the slot `kFirst` on. They lie in memory as items do, {three floats,
// 0}, padded to whole rounds of the threads.
template <class Where, int C, int kFirst>
struct Norms {
  const uint4* slots;
  __device__ __forceinline__ Norms(Slots& all, const float4* from)
      : slots(&all.norms[kFirst][threadIdx.x]) {
#pragma unroll
    for (int n = 0; n < C * Where::kEach; ++n)
      copy16(&all.norms[kFirst + n][threadIdx.x], from + n * kThreads + threadIdx.x);
  }
  __device__ __forceinline__ void read(int c, float (&w)[3 * Where::kEach]) const {
#pragma unroll
    for (int j = 0; j < Where::kEach; ++j) {
      const uint4 v = slots[(c * Where::kEach + j) * kThreads];
      w[3 * j] = __uint_as_float(v.x), w[3 * j + 1] = __uint_as_float(v.y);
      w[3 * j + 2] = __uint_as_float(v.z);
    }
  }
};

// y becomes norm(y).
template <class Where>
__device__ __forceinline__ void normalise(float (&y)[3 * Where::kEach], const Norms<Where, 1, 0>& norm,
                                          float eps, Shared& s) {
  double sum = 0.0;
#pragma unroll
  for (int j = 0; j < 3 * Where::kEach; ++j) sum += square(y[j]);
  const Divisor root(root_of(sum, Where::K, eps, s.sums[0]));
  float w[3 * Where::kEach];
  norm.read(0, w);
#pragma unroll
  for (int j = 0; j < 3 * Where::kEach; ++j) y[j] = root.under(y[j]) * w[j];
}

// int8 values, by planes, of the norm of y for each of C linears.
template <int C, class Where, int kFirst>
__device__ __forceinline__ void quantise(const Where& map, float (&y)[3 * Where::kEach],
                                         const Norms<Where, C, kFirst>& norms, u32* q, float (&steps)[C],
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
    float w[3 * Where::kEach];
    norms.read(c, w);
    u32 top = 0;  // bits of |z| order as numbers do, infinity and NaN above all
#pragma unroll
    for (int j = 0; j < 3 * Where::kEach; ++j)
      top = max(top, __float_as_uint(y[j] * w[j]) & 0x7fffffffu);
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
    float w[3 * Where::kEach];
    norms.read(c, w);
    u8* bytes = reinterpret_cast<u8*>(q + c * 4 * Where::kStride);
#pragma unroll
    for (int j = 0; j < 3 * Where::kEach; ++j) {
      const float v = (y[j] * w[j]) * scale;
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
  static constexpr int kHeld = least(kTurns, kAhead);
  const u8* at[2];
  int tile, slice;

  __device__ __forceinline__ void aim(const u8* weights, int round) {
    const int thread = fresh(threadIdx.x), warp = thread >> 5, lane = thread & 31;
    tile = warp / kShare + round * (kWarps / kShare);
    slice = warp % kShare;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = min(tile * 16 + half * 8 + (lane >> 2), kRows - 1), part = row / kOwn;
      const int channel = min((int)blockIdx.x * kOwn + row - part * kOwn, kStride - 1);
      at[half] = weights + (size_t)(part * kStride + channel) * RB + slice * 64 + (lane & 3) * 16;
    }
  }
  static __device__ __forceinline__ bool within(int turn, int slice) {
    return (turn + 1) * kShare <= kSteps || turn * kShare + slice < kSteps;
  }
  // Copies this thread's part of the first units into its slots.
  __device__ __forceinline__ void ahead(const u8* weights, uint4 (*slots)[kThreads]) {
    aim(weights, 0);
    if (tile < kTiles) {
#pragma unroll
      for (int n = 0; n < kHeld; ++n) {
        if (within(n, slice)) {
          copy16(&slots[2 * n][threadIdx.x], at[0] + n * kShare * 64);
          copy16(&slots[2 * n + 1][threadIdx.x], at[1] + n * kShare * 64);
        }
      }
    }
    end_of_copies();
  }
  __device__ __forceinline__ void run(const u32* q, int* acc, const u8* weights,
                                      const uint4 (*slots)[kThreads]) {
    const int lane = threadIdx.x & 31, column = lane >> 2, t = lane & 3;
    for (int round = 0; round < kRounds; ++round) {
      aim(weights, round);
      if (tile < kTiles) {
        const u32* b = q + (column < C ? column : 0) * 4 * kPlane + t * 4 + slice * 16;
        int c[4][4] = {};
#pragma unroll
        for (int n = 0; n < kTurns; ++n) {
          if (within(n, slice)) {
            const bool here = n < kHeld && round == 0;
            const uint4 w0 = here ? slots[2 * n][threadIdx.x] : load_weights(at[0] + n * kShare * 64);
            const uint4 w1 = here ? slots[2 * n + 1][threadIdx.x] : load_weights(at[1] + n * kShare * 64);
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

extern "C" __constant__ int shared_bytes = kSmall + sizeof(Slots);

extern "C" __global__ void __launch_bounds__(kThreads, 1) decode(const Params p) {
  SHARED_MEMORY(memory);
  Shared& s = *reinterpret_cast<Shared*>(memory);
  Slots& slots = *reinterpret_cast<Slots*>(memory + kSmall);
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
    const int e = MapD::element(threadIdx.x, j / 3, j % 3);
    y[j] = e < 0 ? 0.0f : embedded(p, token, e);
  }
  using ProductI = Product<kOwnD, 3, D, RBD, 3, kPlaneD>;
  using ProductO = Product<kOwnD, 1, D, RBD, 1, kPlaneD>;
  using ProductH = Product<kOwnV, 1, V, RBD, 1, kPlaneD>;
  const auto weights_i = [&](int layer) { return p.ifg + (size_t)layer * 3 * D * RBD; };
  const auto weights_o = [&](int layer) { return p.o + (size_t)layer * D * RBD; };
#if M > 0
  using ProductG = Product<kOwnM, 2, M, RBD, 1, kPlaneD>;
  using ProductD = Product<kOwnD, 1, D, RBM, 1, kPlaneM>;
  const auto weights_g = [&](int layer) { return p.gate + (size_t)layer * 2 * M * RBD; };
  const auto weights_d = [&](int layer) { return p.down + (size_t)layer * D * RBM; };
#endif
  const auto next_layer = [&](int layer) {  // what follows a layer's last phase
    if (layer + 1 < L) ProductI().ahead(weights_i(layer + 1), slots.even);
    else ProductH().ahead(p.head, slots.even);
  };
  ProductI().ahead(weights_i(0), slots.even);
#pragma unroll 1
  for (int layer = 0; layer < L; ++layer) {
    float beta[6];
#pragma unroll
    for (int n = 0; n < 6; ++n) beta[n] = __ldg(p.beta + 6 * layer + n);
    {  // i, f, g and the state
      const Norms<MapD, 1, 0> block(slots, p.mixer_norm + layer * MapD::kPadded);
      const Norms<MapD, 3, MapD::kEach> norms(slots, p.ifg_norm + layer * 3 * MapD::kPadded);
      const float h_old = mine ? p.state_in[layer * D + channel] : 0.0f;
      const float bound = mine ? __ldg(p.bound + layer * D + channel) : 0.0f;
      end_of_copies();
      ProductO().ahead(weights_o(layer), slots.odd);
      if (layer > 0) gather<MapD>(p.items_x, phase, y, s);
      wait_for_copies();
      normalise<MapD>(y, block, NORM_EPS, s);
      float steps[3];
      quantise<3>(map, y, norms, s.q_d, steps, parity, s, p.flag);
      ProductI().run(s.q_d, s.acc[parity], weights_i(layer), slots.even);
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
      const Norms<MapD, 1, 0> block(slots, p.g_norm + layer * MapD::kPadded);
      const Norms<MapD, 1, MapD::kEach> norms(slots, p.o_norm + layer * MapD::kPadded);
      float gates[3 * MapD::kEach];
      end_of_copies();
#if M > 0
      ProductG().ahead(weights_g(layer), slots.even);
#else
      next_layer(layer);
#endif
      gather<MapD>(p.items_g, phase, y, s);
      gather<MapD>(p.items_s, phase, gates, s);
      wait_for_copies();
      normalise<MapD>(y, block, GATE_EPS, s);
#pragma unroll
      for (int j = 0; j < 3 * MapD::kEach; ++j) y[j] = y[j] * gates[j];
      float steps[1];
      quantise<1>(map, y, norms, s.q_d, steps, parity, s, p.flag);
      ProductO().run(s.q_d, s.acc[parity], weights_o(layer), slots.odd);
      ++phase;
      if (warp * kRun < kOwnD) {
        if (mine) x = x + (float)(s.acc[parity][own] - s.sum_q[parity][0]) * (beta[3] * steps[0]);
        publish<kOwnD, kItemsD>(p.items_x, x, warp, phase);
      }
      parity ^= 1;
    }
#if M > 0
    {  // gate and up
      const Norms<MapD, 1, 0> block(slots, p.channel_norm + layer * MapD::kPadded);
      const Norms<MapD, 1, MapD::kEach> norms(slots, p.gate_norm + layer * MapD::kPadded);
      end_of_copies();
      ProductD().ahead(weights_d(layer), slots.odd);
      gather<MapD>(p.items_x, phase, y, s);
      wait_for_copies();
      normalise<MapD>(y, block, NORM_EPS, s);
      float steps[1];
      quantise<1>(map, y, norms, s.q_d, steps, parity, s, p.flag);
      ProductG().run(s.q_d, s.acc[parity], weights_g(layer), slots.even);
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
      using MapM = Map<kOwnM, kItemsM, M, kPlaneM>;
      const MapM wide;
      const Norms<MapM, 1, 0> norms(slots, p.down_norm + layer * MapM::kPadded);
      float inner[3 * MapM::kEach];
      end_of_copies();
      next_layer(layer);
      gather<MapM>(p.items_y, phase, inner, s);
      wait_for_copies();
      float steps[1];
      quantise<1>(wide, inner, norms, s.q_m, steps, parity, s, p.flag);
      ProductD().run(s.q_m, s.acc[parity], weights_d(layer), slots.odd);
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
  const Norms<MapD, 1, 0> block(slots, p.final_norm);
  const Norms<MapD, 1, MapD::kEach> norms(slots, p.head_norm);
  end_of_copies();
  end_of_copies();  // none: what is waited for is all but the latest group
  gather<MapD>(p.items_x, phase, y, s);
  wait_for_copies();
  normalise<MapD>(y, block, NORM_EPS, s);
  float steps[1];
  quantise<1>(map, y, norms, s.q_d, steps, parity, s, p.flag);
  ProductH().run(s.q_d, s.acc[parity], p.head, slots.even);
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
