// The ternary product of decode.cu on the int8 matrix unit: A = 16 weight rows, B = activations. A
// byte b of weights holds four codes c0 + 4 c1 + 16 c2 + 64 c3, code p meets plane p of the
// activations. With mask p (3, 15, 63, none) the byte keeps its codes up to p; a product of that
// with planes p and p + 1, side by side in two columns, gives T(p, p) and T(p, p + 1), and the sum
// of all c_p q_p is T(0, 0) + sum_p (T(p, p) - T(p - 1, p)) / 4^p. Each linear that shares the
// input has two columns of its own.
#pragma once

#include "decode_vector.cuh"

// A row in shared memory: an odd number of 64 bytes, so that rows side by side lie in other banks.
__host__ __device__ constexpr int line_of(int bytes) { return bytes + (bytes % 128 ? 0 : 64); }
__host__ __device__ constexpr int tile_bytes(int rows, int bytes) {
  return ceil_div(rows, 16) * 16 * line_of(bytes);
}
// Warps are dealt out as `slices` of the columns x `groups` of the tiles of 16 rows, so that the
// busiest one has least to do. A step is 64 bytes of a row.
struct Deal {
  int slices, groups;
};
__host__ __device__ constexpr int work_of(Deal deal, int tiles, int steps) {
  return ceil_div(steps, deal.slices) * ceil_div(tiles, deal.groups);
}
__host__ __device__ constexpr Deal best_deal(int rows, int bytes) {
  const int tiles = ceil_div(rows, 16), steps = bytes / 64;
  Deal best = {1, least(kWarps, tiles)};
  for (int slices = 2; slices <= least(kWarps, steps); ++slices) {
    const Deal deal = {slices, least(kWarps / slices, tiles)};
    if (work_of(deal, tiles, steps) < work_of(best, tiles, steps)) best = deal;
  }
  return best;
}
__host__ __device__ constexpr int parts_of(int rows, int bytes) {
  return best_deal(rows, bytes).slices * ceil_div(rows, 16) * 16;
}

// sum_k code * q of this block's rows: `kParts` pieces of `kOwn` rows, piece c of `kStride` rows of
// the matrix. With C linears piece c meets vector c, else all meet the only one. Each warp leaves
// its part of the sums. Rows beyond the last one repeat it: no load has a condition. The first
// kHeld tiles lie in shared memory, `kBytes` of it, those behind them are read from where they are.
template <int kOwn, int kParts, int kStride, class Where, int RB, int C, int kBytes>
struct Product {
  static constexpr int kRows = kOwn * kParts, kTiles = ceil_div(kRows, 16), kSteps = RB / 64;
  static constexpr int kSlices = best_deal(kRows, RB).slices, kGroups = best_deal(kRows, RB).groups;
  static constexpr int kTurns = ceil_div(kSteps, kSlices), kEach = ceil_div(kTiles, kGroups);
  static constexpr bool kKept = kTurns <= 3 && kEach > 1;  // activations, over all tiles of a warp
  static constexpr int kLine = line_of(RB), kHeld = least(kTiles, kBytes / (16 * kLine));
  static constexpr int kHeldRows = least(kRows, 16 * kHeld), kAhead = kHeldRows * RB;
  static_assert(C == 1 || C == kParts, "a vector for each piece, or one for all");

  static __device__ __forceinline__ const u8* row_at(const u8* weights, int row) {
    const int part = row / kOwn;
    const int channel = min((int)blockIdx.x * kOwn + row - part * kOwn, kStride - 1);
    return weights + (size_t)(part * kStride + channel) * RB;
  }
  // By the lanes of one warp.
  static __device__ __forceinline__ void ahead(const u8* weights, u8* held, u64* barrier) {
#pragma unroll 1
    for (int row = threadIdx.x & 31; row < kHeldRows; row += 32)
      copy(held + row * kLine, row_at(weights, row), RB, barrier);
  }
  // Into the second cache, a piece a lane.
  static __device__ __forceinline__ void call(const u8* weights) {
    const int lane = threadIdx.x & 31, first = blockIdx.x * kOwn;
    const int rows = min(kOwn, kStride - first);
    if (lane < kParts && rows > 0)
      prefetch(weights + ((size_t)lane * kStride + first) * RB, rows * RB);
  }
  static __device__ __forceinline__ bool within(int turn, int slice) {
    return (turn + 1) * kSlices <= kSteps || turn * kSlices + slice < kSteps;
  }
  // Planes that meet masks 0 to 3: in odd columns the next ones, there is none behind the last.
  static __device__ __forceinline__ void read(uint4 (&v)[4], const u32* q, bool odd) {
    const u32* from = q + (odd ? Where::kPlane : 0);
#pragma unroll
    for (int p = 0; p < 4; ++p)
      v[p] = *reinterpret_cast<const uint4*>((p < 3 ? from : q) + p * Where::kPlane);
  }
  static __device__ __forceinline__ void multiply(int (&c)[4][4], const uint4& w0, const uint4& w1,
                                                  const uint4 (&v)[4]) {
#pragma unroll
    for (int p = 0; p < 4; ++p) {
      const u32 mask = 0x03030303u * (p == 0 ? 1 : p == 1 ? 5 : p == 2 ? 21 : 85);
      mma(c[p], w0.x & mask, w1.x & mask, w0.y & mask, w1.y & mask, v[p].x, v[p].y);
      mma(c[p], w0.z & mask, w1.z & mask, w0.w & mask, w1.w & mask, v[p].z, v[p].w);
    }
  }
  static __device__ __forceinline__ void run(const u32* q, int* parts, const u8* weights,
                                             const u8* held) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, column = lane >> 2, t = lane & 3;
    const int slice = warp % kSlices, group = warp / kSlices;
    if (group < kGroups) {
      const u32* from =
          q + (C == 1 ? 0 : min(column >> 1, C - 1)) * Where::kPlanes + t * 4 + slice * 16;
      uint4 kept[kKept ? kTurns : 1][4];
      if (kKept) {
#pragma unroll
        for (int n = 0; n < kTurns; ++n)
          if (within(n, slice)) read(kept[n], from + n * kSlices * 16, column & 1);
      }
#pragma unroll(kEach <= 8 ? kEach : 4)
      for (int m = 0; m < kEach; ++m) {
        const int tile = group + m * kGroups;
        if (kEach * kGroups > kTiles && tile >= kTiles) break;
        const bool here = kHeld == kTiles || tile < kHeld;
        const u8* at[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = min(tile * 16 + half * 8 + column, kRows - 1);
          at[half] = (here ? held + row * kLine : row_at(weights, row)) + slice * 64 + t * 16;
        }
        int c[4][4] = {};
#pragma unroll
        for (int n = 0; n < kTurns; ++n) {
          if (!within(n, slice)) break;
          const int step = n * kSlices * 64;
          uint4 w[2];
#pragma unroll
          for (int half = 0; half < 2; ++half)
            w[half] = here ? *reinterpret_cast<const uint4*>(at[half] + step)
                           : load_weights(at[half] + step);
          if (!kKept) read(kept[0], from + n * kSlices * 16, column & 1);
          multiply(c, w[0], w[1], kept[kKept ? n : 0]);
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = tile * 16 + half * 8 + column, h = 2 * half;
          if (t == (C == 1 ? 0 : min(row / kOwn, C - 1)))
            parts[slice * (kTiles * 16) + row] = c[0][h] + ((c[1][h] - c[0][h + 1]) >> 2) +
                                                 ((c[2][h] - c[1][h + 1]) >> 4) +
                                                 ((c[3][h] - c[2][h + 1]) >> 6);
        }
      }
    }
    sync_workers();
  }
  static __device__ __forceinline__ int total(const int* parts, int row) {
    int sum = 0;
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) sum += parts[slice * (kTiles * 16) + row];
    return sum;
  }
};
