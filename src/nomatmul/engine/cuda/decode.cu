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
// Weights and norm weights are copied into shared memory a whole phase ahead, right after a phase has what it
// waited for: they stream while the block computes, and the exchange finds the way to L2 empty. On Hopper the
// copy engine does it, a row or a vector an instruction: 16 bytes a thread cost 0.8 us of a phase to ask for. The product runs on the int8 matrix unit: A = 16 weight rows, a packed word masked
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
  Item *items_x, *items_g, *items_y;  // items_g: g, and behind it the gate
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
  alignas(8) u64 ready[2];  // barriers that copies of even and of odd phases arrive at
};

__host__ __device__ constexpr int rounds_of(int items) { return ceil_div(items * BLOCKS, kThreads); }
__host__ __device__ constexpr int least(int a, int b) { return a < b ? a : b; }
// 16-byte pieces that a thread copies of the norm weights of `linears` vectors
__host__ __device__ constexpr int norm_slots(int linears, int items) {
  return ceil_div(3 * linears * rounds_of(items), 4);
}
constexpr int kEvenNorms = norm_slots(1, kItemsD) + norm_slots(3, kItemsD);
constexpr int kOddNorms = largest(2 * norm_slots(1, kItemsD), norm_slots(1, kItemsM));
constexpr int kSmall = ceil_div((int)sizeof(Shared), 16) * 16;

// A row in shared memory: an odd number of 64 bytes, so that rows side by side lie in other banks.
__host__ __device__ constexpr int line_of(int row_bytes) { return row_bytes + (row_bytes % 128 ? 0 : 64); }
__host__ __device__ constexpr int tile_bytes(int rows, int row_bytes) {
  return ceil_div(rows, 16) * 16 * line_of(row_bytes);
}
// Bytes of weights that are copied ahead in even and in odd phases: all, if they fit.
constexpr int kRoom = SHARED_LIMIT - kSmall - (kEvenNorms + kOddNorms) * kThreads * 16;
constexpr int kOddNeed = largest(tile_bytes(kOwnD, RBD), M ? tile_bytes(kOwnD, RBM) : 0);
constexpr int kEvenNeed = largest(tile_bytes(largest(3 * kOwnD, kOwnV), RBD), M ? tile_bytes(2 * kOwnM, RBD) : 0);
constexpr int kOddBytes = least(kOddNeed, kRoom / 3 / 64 * 64);
constexpr int kEvenBytes = least(kEvenNeed, (kRoom - kOddBytes) / 64 * 64);
static_assert(kRoom >= 0, "this chip has too little shared memory for a model so wide");
static_assert(kOwnD <= kWarps * kRun && kOwnM <= kWarps * kRun,
              "this chip has too few multiprocessors for a model so wide");

// Copies on their way: of even and of odd phases.
typedef uint4 Slot[kThreads];
struct Slots {
  Slot even_norms[kEvenNorms], odd_norms[kOddNorms];
  alignas(16) u8 even[kEvenBytes + 16], odd[kOddBytes + 16];
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
// Reads an item again unless it is of this phase. One predicated access: those of a thread overlap.
__device__ __forceinline__ void read_item(const Item* at, u32 phase, u64& low, u64& high) {
  asm volatile("{ .reg .b128 v; .reg .pred p; setp.ne.u32 p, %3, %4;"
               " @p ld.relaxed.gpu.global.b128 v, [%2]; @p mov.b128 {%0, %1}, v; }"
               : "+l"(low), "+l"(high) : "l"(at), "r"((u32)(high >> 32)), "r"(phase) : "memory");
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
#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ u32 shared_at(const void* at) { return (u32)__cvta_generic_to_shared(at); }
__device__ __forceinline__ void start_barrier(u64* at) {
  asm volatile("mbarrier.init.shared.b64 [%0], 1; fence.proxy.async;" :: "r"(shared_at(at)) : "memory");
}
// One thread says how many bytes will come; others may have asked for theirs already.
__device__ __forceinline__ void expect(u64* at, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" :: "r"(shared_at(at)), "r"(bytes) : "memory");
}
__device__ __forceinline__ void copy(void* to, const void* from, int bytes, u64* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               :: "r"(shared_at(to)), "l"(from), "r"(bytes), "r"(shared_at(barrier)) : "memory");
}
__device__ __forceinline__ void wait_for_copies(u64* barrier, u32 parity) {
  u32 done = 0;
  while (!done)
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(done) : "r"(shared_at(barrier)), "r"(parity) : "memory");
}
#else
__device__ __forceinline__ void start_barrier(u64*) {}
__device__ __forceinline__ void expect(u64*, int) {}
__device__ __forceinline__ void copy(void* to, const void* from, int bytes, u64*) {
  const u32 at = (u32)__cvta_generic_to_shared(to);
  for (int n = 0; n < bytes; n += 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(at + n), "l"((const u8*)from + n) : "memory");
}
__device__ __forceinline__ void wait_for_copies(u64*, u32) {
  asm volatile("cp.async.wait_all;" ::: "memory");
  __syncthreads();
}
#endif
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
  static constexpr int kStride = kPlane;
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

// Waits for this thread's items of a phase, of P vectors that lie kStride items apart.
template <class Where, int P, int kVectors>
__device__ __forceinline__ void gather(const Item* items, u32 phase,
                                       float (&out)[kVectors][3 * Where::kEach], Shared& s) {
  u64 low[P][Where::kEach], high[P][Where::kEach];
  const Item* mine = items + threadIdx.x;
#pragma unroll
  for (int n = 0; n < P * Where::kEach; ++n) {
    const bool live = threadIdx.x + n % Where::kEach * kThreads < Where::kAll;
    low[n / Where::kEach][n % Where::kEach] = 0;
    high[n / Where::kEach][n % Where::kEach] = (u64)(live ? phase - 1 : phase) << 32;
  }
  for (u32 polls = 0;; ++polls) {
#pragma unroll
    for (int n = 0; n < P * Where::kEach; ++n) {
      const int vector = n / Where::kEach, j = n % Where::kEach;
      read_item(mine + vector * Where::kAll + j * kThreads, phase, low[vector][j], high[vector][j]);
    }
    bool waiting = false;
#pragma unroll
    for (int n = 0; n < P * Where::kEach; ++n)
      waiting |= (u32)(high[n / Where::kEach][n % Where::kEach] >> 32) != phase;
    if (!waiting) break;
    if (polls > kPatience || *(volatile int*)&s.dead) { *(volatile int*)&s.dead = 1; break; }
  }
#pragma unroll
  for (int n = 0; n < P * Where::kEach; ++n) {
    const int vector = n / Where::kEach, j = n % Where::kEach;
    out[vector][3 * j] = __uint_as_float((u32)low[vector][j]);
    out[vector][3 * j + 1] = __uint_as_float((u32)(low[vector][j] >> 32));
    out[vector][3 * j + 2] = __uint_as_float((u32)high[vector][j]);
  }
}

// A warp's lanes 0..29 hold channels run * 30 + lane of this block; their items go out.
template <int kItems>
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

// Norm weights of C linears. They lie in memory as threads copy them: the 3 * C * kEach floats of a thread in
// pieces of four, a piece of all threads side by side.
template <class Where, int C>
struct Norms {
  static constexpr int kFloats = 3 * Where::kEach, kSlots = ceil_div(C * kFloats, 4);
  const Slot* slots;
  static constexpr int kBytes = kSlots * kThreads * 16;
  static __device__ __forceinline__ void ahead(Slot* to, const float4* from, int layer, u64* barrier) {
    if (threadIdx.x == 0) copy(to, from + (size_t)layer * (kBytes / 16), kBytes, barrier);
  }
  __device__ __forceinline__ void read(float (&w)[C][kFloats]) const {
#pragma unroll
    for (int n = 0; n < kSlots; ++n) {
      const uint4 v = slots[n][threadIdx.x];
      const u32 four[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int k = 0; k < 4; ++k)
        if (4 * n + k < C * kFloats) w[(4 * n + k) / kFloats][(4 * n + k) % kFloats] = __uint_as_float(four[k]);
    }
  }
};

// y becomes norm(y).
template <class Where>
__device__ __forceinline__ void normalise(float (&y)[3 * Where::kEach], const Slot* slots, float eps,
                                          Shared& s) {
  double sum = 0.0;
#pragma unroll
  for (int j = 0; j < 3 * Where::kEach; ++j) sum += square(y[j]);
  float w[1][3 * Where::kEach];
  Norms<Where, 1>{slots}.read(w);
  const Divisor root(root_of(sum, Where::K, eps, s.sums[0]));
#pragma unroll
  for (int j = 0; j < 3 * Where::kEach; ++j) y[j] = root.under(y[j]) * w[0][j];
}

// int8 values, by planes, of the norm of y for each of C linears.
template <int C, class Where>
__device__ __forceinline__ void quantise(const Where& map, float (&y)[3 * Where::kEach], const Slot* slots,
                                         u32* q, float (&steps)[C], int parity, Shared& s, int* flag) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  double sum = 0.0;
#pragma unroll
  for (int j = 0; j < 3 * Where::kEach; ++j) sum += square(y[j]);
  float z[C][3 * Where::kEach];
  Norms<Where, C>{slots}.read(z);
  const Divisor root(root_of(sum, Where::K, LINEAR_EPS, s.sums[1]));
  u32 tops[C];  // bits of |z| order as numbers do, infinity and NaN above all
#pragma unroll
  for (int c = 0; c < C; ++c) {
    tops[c] = 0;
#pragma unroll
    for (int j = 0; j < 3 * Where::kEach; ++j) {
      z[c][j] = root.under(y[j]) * z[c][j];
      tops[c] = max(tops[c], __float_as_uint(z[c][j]) & 0x7fffffffu);
    }
  }
#pragma unroll
  for (int c = 0; c < C; ++c) {
    tops[c] = __reduce_max_sync(~0u, tops[c]);
    if (lane == 0) s.tops[c][warp] = tops[c];
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
      const float v = z[c][j] * scale;
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
// last one repeat it and are dropped at the end: no load has a condition. The first kHeld tiles lie in
// shared memory, `kBytes` of it, those behind them are read from where they are.
template <int kOwn, int kParts, int kStride, int RB, int C, int kPlane, int kBytes>
struct Product {
  static constexpr int kRows = kOwn * kParts, kTiles = ceil_div(kRows, 16), kSteps = RB / 64;
  static constexpr int kShare = kTiles < kWarps ? kWarps / kTiles : 1;
  static constexpr int kRounds = ceil_div(kTiles * kShare, kWarps), kTurns = ceil_div(kSteps, kShare);
  static constexpr int kLine = line_of(RB), kHeld = least(kTiles, kBytes / (16 * kLine));
  static constexpr int kHeldRows = least(kRows, 16 * kHeld), kAhead = kHeldRows * RB;

  static __device__ __forceinline__ const u8* row_at(const u8* weights, int row) {
    const int part = row / kOwn, channel = min((int)blockIdx.x * kOwn + row - part * kOwn, kStride - 1);
    return weights + (size_t)(part * kStride + channel) * RB;
  }
  static __device__ __forceinline__ void ahead(const u8* weights, u8* held, u64* barrier) {
#pragma unroll 1
    for (int row = threadIdx.x; row < kHeldRows; row += kThreads)
      copy(held + row * kLine, row_at(weights, row), RB, barrier);
  }
  static __device__ __forceinline__ bool within(int turn, int slice) {
    return (turn + 1) * kShare <= kSteps || turn * kShare + slice < kSteps;
  }
  // c[p][..] += the tile's rows times the activations, in this warp's turns.
  template <bool kHere>
  static __device__ __forceinline__ void turns(int (&c)[4][4], const u32* q, const u8* weights, const u8* held,
                                               int tile, int slice) {
    const int lane = threadIdx.x & 31, column = lane >> 2, t = lane & 3;
    const u8* at[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = min(tile * 16 + half * 8 + column, kRows - 1);
      at[half] = (kHere ? held + row * kLine : row_at(weights, row)) + slice * 64 + t * 16;
    }
    const u32* b = q + (column < C ? column : 0) * 4 * kPlane + t * 4 + slice * 16;
#pragma unroll
    for (int n = 0; n < kTurns; ++n) {
      if (within(n, slice)) {
        const int step = n * kShare * 64;
        const uint4 w0 = kHere ? *reinterpret_cast<const uint4*>(at[0] + step) : load_weights(at[0] + step);
        const uint4 w1 = kHere ? *reinterpret_cast<const uint4*>(at[1] + step) : load_weights(at[1] + step);
#pragma unroll
        for (int p = 0; p < 4; ++p) {
          const u32 mask = 0x03030303u << (2 * p);
          const uint4 v = *reinterpret_cast<const uint4*>(b + p * kPlane + n * kShare * 16);
          mma(c[p], w0.x & mask, w1.x & mask, w0.y & mask, w1.y & mask, v.x, v.y);
          mma(c[p], w0.z & mask, w1.z & mask, w0.w & mask, w1.w & mask, v.z, v.w);
        }
      }
    }
  }
  static __device__ __forceinline__ void run(const u32* q, int* acc, const u8* weights, const u8* held) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, t = lane & 3;
    const int slice = warp % kShare;
    for (int round = 0; round < kRounds; ++round) {
      const int tile = warp / kShare + round * (kWarps / kShare);
      if (tile < kTiles) {
        int c[4][4] = {};
        if (tile < kHeld) turns<true>(c, q, weights, held, tile, slice);
        else if (kHeld < kTiles) turns<false>(c, q, weights, held, tile, slice);
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

// Copies what the next phase needs: its first norm, those of its linears, its weights.
struct Place { Slot* norms; u8* weights; u64* ready; };
template <class Product, class Block, class Linears>
__device__ __forceinline__ void copy_ahead(const Place& to, const u8* weights, const float4* block,
                                           const float4* linears, int layer) {
  if (threadIdx.x == 0) expect(to.ready, Block::kBytes + Linears::kBytes + Product::kAhead);
  Block::ahead(to.norms, block, layer, to.ready);
  Linears::ahead(to.norms + Block::kSlots, linears, layer, to.ready);
  Product::ahead(weights, to.weights, to.ready);
}
struct Nothing {
  static constexpr int kBytes = 0, kSlots = 0;
  static __device__ __forceinline__ void ahead(Slot*, const float4*, int, u64*) {}
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
  if (threadIdx.x == 0) start_barrier(&s.ready[0]), start_barrier(&s.ready[1]);
  __syncthreads();
  const Place even{slots.even_norms, slots.even, &s.ready[0]}, odd{slots.odd_norms, slots.odd, &s.ready[1]};

  const int token = p.token >= 0 ? p.token : *p.token_in;
  float x = mine ? embedded(p, token, channel) : 0.0f;
  using MapD = Map<kOwnD, kItemsD, D, kPlaneD>;
  const MapD map;

  u32 phase = p.phase;  // of the last items written; items of a token start behind it
  int parity = 0;
  float vectors[2][3 * MapD::kEach], (&y)[3 * MapD::kEach] = vectors[0];
#pragma unroll
  for (int j = 0; j < 3 * MapD::kEach; ++j) {
    const int e = MapD::element(threadIdx.x, j / 3, j % 3);
    y[j] = e < 0 ? 0.0f : embedded(p, token, e);
  }
  using ProductI = Product<kOwnD, 3, D, RBD, 3, kPlaneD, kEvenBytes>;
  using ProductO = Product<kOwnD, 1, D, RBD, 1, kPlaneD, kOddBytes>;
  using ProductH = Product<kOwnV, 1, V, RBD, 1, kPlaneD, kEvenBytes>;
  const auto weights_i = [&](int layer) { return p.ifg + (size_t)layer * 3 * D * RBD; };
  const auto weights_o = [&](int layer) { return p.o + (size_t)layer * D * RBD; };
#if M > 0
  using ProductG = Product<kOwnM, 2, M, RBD, 1, kPlaneD, kEvenBytes>;
  using MapM = Map<kOwnM, kItemsM, M, kPlaneM>;
  using ProductD = Product<kOwnD, 1, D, RBM, 1, kPlaneM, kOddBytes>;
  const auto weights_g = [&](int layer) { return p.gate + (size_t)layer * 2 * M * RBD; };
  const auto weights_d = [&](int layer) { return p.down + (size_t)layer * D * RBM; };
#endif
  using One = Norms<MapD, 1>;
  const auto start_layer = [&](int layer) {  // or, behind the last one, the head
    if (layer < L)
      copy_ahead<ProductI, One, Norms<MapD, 3>>(even, weights_i(layer), p.mixer_norm, p.ifg_norm, layer);
    else copy_ahead<ProductH, One, One>(even, p.head, p.final_norm, p.head_norm, 0);
  };
  const auto turn = [&] { return (phase - p.phase) >> 1 & 1; };  // how often a barrier has been used
  start_layer(0);
#pragma unroll 1
  for (int layer = 0; layer < L; ++layer) {
    float beta[6];
#pragma unroll
    for (int n = 0; n < 6; ++n) beta[n] = __ldg(p.beta + 6 * layer + n);
    {  // i, f, g and the state
      const float h_old = mine ? p.state_in[layer * D + channel] : 0.0f;
      const float bound = mine ? __ldg(p.bound + layer * D + channel) : 0.0f;
      if (layer > 0) gather<MapD, 1>(p.items_x, phase, vectors, s);
      wait_for_copies(&s.ready[parity], turn());
      copy_ahead<ProductO, One, One>(odd, weights_o(layer), p.g_norm, p.o_norm, layer);
      normalise<MapD>(y, slots.even_norms, NORM_EPS, s);
      float steps[3];
      quantise<3>(map, y, slots.even_norms + One::kSlots, s.q_d, steps, parity, s, p.flag);
      ProductI::run(s.q_d, s.acc[parity], weights_i(layer), slots.even);
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
        publish<kItemsD>(p.items_g, g, warp, phase);
        publish<kItemsD>(p.items_g + MapD::kAll, gate, warp, phase);
      }
      parity ^= 1;
    }
    {  // o
      gather<MapD, 2>(p.items_g, phase, vectors, s);
      wait_for_copies(&s.ready[parity], turn());
#if M > 0
      copy_ahead<ProductG, One, One>(even, weights_g(layer), p.channel_norm, p.gate_norm, layer);
#else
      start_layer(layer + 1);
#endif
      normalise<MapD>(y, slots.odd_norms, GATE_EPS, s);
#pragma unroll
      for (int j = 0; j < 3 * MapD::kEach; ++j) y[j] = y[j] * vectors[1][j];
      float steps[1];
      quantise<1>(map, y, slots.odd_norms + One::kSlots, s.q_d, steps, parity, s, p.flag);
      ProductO::run(s.q_d, s.acc[parity], weights_o(layer), slots.odd);
      ++phase;
      if (warp * kRun < kOwnD) {
        if (mine) x = x + (float)(s.acc[parity][own] - s.sum_q[parity][0]) * (beta[3] * steps[0]);
        publish<kItemsD>(p.items_x, x, warp, phase);
      }
      parity ^= 1;
    }
#if M > 0
    {  // gate and up
      gather<MapD, 1>(p.items_x, phase, vectors, s);
      wait_for_copies(&s.ready[parity], turn());
      copy_ahead<ProductD, Nothing, Norms<MapM, 1>>(odd, weights_d(layer), nullptr, p.down_norm, layer);
      normalise<MapD>(y, slots.even_norms, NORM_EPS, s);
      float steps[1];
      quantise<1>(map, y, slots.even_norms + One::kSlots, s.q_d, steps, parity, s, p.flag);
      ProductG::run(s.q_d, s.acc[parity], weights_g(layer), slots.even);
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
        publish<kItemsM>(p.items_y, value, warp, phase);
      }
      parity ^= 1;
    }
    {  // down
      const MapM wide;
      float inner[1][3 * MapM::kEach];
      gather<MapM, 1>(p.items_y, phase, inner, s);
      wait_for_copies(&s.ready[parity], turn());
      start_layer(layer + 1);
      float steps[1];
      quantise<1>(wide, inner[0], slots.odd_norms, s.q_m, steps, parity, s, p.flag);
      ProductD::run(s.q_m, s.acc[parity], weights_d(layer), slots.odd);
      ++phase;
      if (warp * kRun < kOwnD) {
        if (mine) x = x + (float)(s.acc[parity][own] - s.sum_q[parity][0]) * (beta[5] * steps[0]);
        publish<kItemsD>(p.items_x, x, warp, phase);
      }
      parity ^= 1;
    }
#endif
  }
  // final norm, head, likeliest token
  gather<MapD, 1>(p.items_x, phase, vectors, s);
  wait_for_copies(&s.ready[parity], turn());
  normalise<MapD>(y, slots.even_norms, NORM_EPS, s);
  float steps[1];
  quantise<1>(map, y, slots.even_norms + One::kSlots, s.q_d, steps, parity, s, p.flag);
  ProductH::run(s.q_d, s.acc[parity], p.head, slots.even);
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
