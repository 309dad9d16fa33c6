// The int8 product of Hopper's matrix units: out[c, t, n] = sum_k q[c, t, k] * w[c, n, k], exact, for
// matrices that are unpacked already.
//
// As many blocks as processors stay and walk tiles of kTokens x BN results. Of a block's three groups
// of four warps the first copies pieces of 128 columns of both operands into shared memory (the copy
// engine, kStages ahead), the others multiply them, 64 tokens each, with sums in registers. The copies
// of the next tile go on while a tile is stored.
//
// Defined by the host: BN, STAGES, GLU (0, 1), WGMMA (the instruction's text) and SUMS (its BN / 2
// registers d[0], d[1], ... as operands).

#include "float_steps.cuh"

typedef unsigned int u32;
typedef unsigned long long u64;

constexpr int kTokens = 128, kColumns = 128, kStages = STAGES, kStage = (kTokens + BN) * kColumns;
constexpr int kGroup = 8;  // tiles of tokens that walk the rows together, so that both stay in L2
extern "C" __constant__ int shared_bytes = kStages * kStage + 1024 + 16 * kStages;

struct alignas(64) Map { char opaque[128]; };  // CUtensorMap

__device__ __forceinline__ u32 address(const void* at) { return (u32)__cvta_generic_to_shared(at); }
__device__ __forceinline__ void start_barrier(u64* at, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(address(at)), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void expect(u64* at, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
               :: "r"(address(at)), "r"(bytes) : "memory");
}
__device__ __forceinline__ void arrive(u64* at) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(address(at)) : "memory");
}
__device__ __forceinline__ void wait(u64* at, u32 parity) {
  asm volatile("{ .reg .pred p; again: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;"
               " @!p bra again; }" :: "r"(address(at)), "r"(parity) : "memory");
}
// A box of kColumns columns from (column, row) on, as wide in rows as the map says.
__device__ __forceinline__ void fetch(void* to, const Map* map, int column, int row, u64* bar) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
               " [%0], [%1, {%2, %3}], [%4];"
               :: "r"(address(to)), "l"(map), "r"(column), "r"(row), "r"(address(bar)) : "memory");
}
// Rows of 128 bytes in groups of eight, swizzled as the copies leave them.
__device__ __forceinline__ u64 described(const void* at) {
  return (u64)(address(at) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}
// d (+)= 64 tokens x 32 columns times 32 columns x BN rows, by the four warps together.
__device__ __forceinline__ void multiply(int (&d)[BN / 2], u64 q, u64 w, int more) {
  asm volatile(WGMMA : SUMS : "l"(q), "l"(w), "r"(more));
}
// Tells the compiler that the sums change behind its back.
__device__ __forceinline__ void touch(int (&d)[BN / 2]) {
#pragma unroll
  for (int i = 0; i < BN / 2; ++i) asm volatile("" : "+r"(d[i]) :: "memory");
}

struct Tile { int linear, token, row; };

__device__ __forceinline__ Tile tile_of(int tile, int tokens, int rows) {
  const int across = (rows + BN - 1) / BN, down = (tokens + kTokens - 1) / kTokens;
  const int inner = tile % (across * down), first = inner / (kGroup * across) * kGroup;
  const int height = min(down - first, kGroup), rest = inner % (kGroup * across);
  return {tile / (across * down), (first + rest % height) * kTokens, rest / height * BN};
}

// Results of one thread: two tokens, eight apart, and in each two of every eight rows. `out` begins
// at the tile; its lines lie `stride` apart; `tokens` and `width` of them are inside.
__device__ __forceinline__ void store(const int (&d)[BN / 2], char* out, const float* steps, float w_scale,
                                      int tokens, int width, int stride) {
  const int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int t = warp * 16 + lane / 4 + 8 * half;
    if (t < tokens) {
#if GLU
      float* line = reinterpret_cast<float*>(out) + (size_t)t * stride;
      const float scale = w_scale * steps[t];
#pragma unroll
      for (int j = 0; j < BN / 16; ++j) {
        const int n = 8 * j + lane % 4 * 2, up = j + BN / 16;
        const float y0 = silu((float)d[4 * j + 2 * half] * scale) * ((float)d[4 * up + 2 * half] * scale);
        const float y1 =
            silu((float)d[4 * j + 2 * half + 1] * scale) * ((float)d[4 * up + 2 * half + 1] * scale);
        if (n < width) *reinterpret_cast<float2*>(line + n) = make_float2(y0, y1);
      }
#else
      int* line = reinterpret_cast<int*>(out) + (size_t)t * stride;
#pragma unroll
      for (int j = 0; j < BN / 8; ++j) {
        const int n = 8 * j + lane % 4 * 2;
        if (n < width)
          *reinterpret_cast<int2*>(line + n) = make_int2(d[4 * j + 2 * half], d[4 * j + 2 * half + 1]);
      }
#endif
    }
  }
}

// int32 sums, or with GLU float32 silu(gate) * up: then BN / 2 rows of gate and as many of up take
// turns in w. Of the `rows` of a linear's w `width` results are inside; out's linears lie `part` apart.
extern "C" __global__ void __launch_bounds__(384, 1)
    product(const __grid_constant__ Map q_map, const __grid_constant__ Map w_map, int* out,
            const float* steps, float w_scale, int tokens, int rows, int width, int part, int stride,
            int columns, int tiles) {
  extern __shared__ char raw[];
  char* stages = reinterpret_cast<char*>(((u64)raw + 1023) & ~1023ull);
  u64* full = reinterpret_cast<u64*>(stages + kStages * kStage);
  u64* empty = full + kStages;
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) start_barrier(full + s, 1), start_barrier(empty + s, 8);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }
  __syncthreads();
  const int group = threadIdx.x / 128 - 1, steps_k = columns / kColumns;
  int stage = 0;
  u32 round = 0;
  const auto next = [&] { if (++stage == kStages) stage = 0, round ^= 1; };
  if (group < 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x != 0) return;
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
      const Tile at = tile_of(tile, tokens, rows);
      for (int k = 0; k < steps_k; ++k, next()) {
        char* to = stages + stage * kStage;
        wait(empty + stage, round ^ 1);
        expect(full + stage, kStage);
        fetch(to, &q_map, k * kColumns, at.linear * tokens + at.token, full + stage);
        fetch(to + kTokens * kColumns, &w_map, k * kColumns, at.linear * rows + at.row, full + stage);
      }
    }
    return;
  }
  asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
  const bool speaks = threadIdx.x % 32 == 0;
  int d[BN / 2];
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const Tile at = tile_of(tile, tokens, rows);
    int last = 0;
    for (int k = 0; k < steps_k; ++k, next()) {
      const char* from = stages + stage * kStage;
      const u64 q = described(from + group * 64 * kColumns), w = described(from + kTokens * kColumns);
      wait(full + stage, round);
      touch(d);
      asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
      for (int quarter = 0; quarter < 4; ++quarter)  // 32 columns: two units of 16 bytes further
        multiply(d, q + 2 * quarter, w + 2 * quarter, k > 0 || quarter > 0);
      asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
      if (k > 0) {
        asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
        if (speaks) arrive(empty + last);
      }
      last = stage;
    }
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    touch(d);
    if (speaks) arrive(empty + last);
    const int token = at.token + group * 64, row = GLU ? at.row / 2 : at.row;
    int* to = out + (size_t)at.linear * part + (size_t)token * stride + row;
    store(d, reinterpret_cast<char*>(to), steps + token, w_scale, tokens - token, width - row, stride);
  }
}
