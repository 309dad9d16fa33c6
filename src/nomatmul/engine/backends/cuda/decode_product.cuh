// The ternary product of decode.cu. A byte of weights holds four codes; with a mask it keeps the
// code of one plane, 4^p fold, and a dot product of four such bytes with four int8 values of that
// plane is one instruction (dp4a). The int8 matrix unit is slower here: seven of its eight columns
// are empty.
#pragma once

#include "decode_vector.cuh"

// A row in shared memory: an odd number of 64 bytes, so that rows side by side lie in other banks.
__host__ __device__ constexpr int line_of(int bytes) { return bytes + (bytes % 128 ? 0 : 64); }

// Warps are dealt out as `slices` of the columns x `groups` of the runs of 8 rows, so that the
// busiest one has least to do. A step is 64 bytes of a row.
#ifndef UNROLL
#define UNROLL 2
#endif
constexpr int kUnroll = UNROLL;
struct Deal {
  int slices, groups;
};
__host__ __device__ constexpr int work_of(Deal deal, int runs, int steps) {
  return ceil_div(steps, deal.slices) * ceil_div(runs, deal.groups);
}
__host__ __device__ constexpr Deal best_deal(int runs, int steps) {
  Deal best = {1, least(kWarps, runs)};
  for (int slices = 2; slices <= least(kWarps, steps); ++slices) {
    const Deal deal = {slices, least(kWarps / slices, runs)};
    if (work_of(deal, runs, steps) < work_of(best, runs, steps)) best = deal;
  }
  return best;
}

// sum_k code * q of this block's rows: `kParts` pieces of `kOwn` rows, piece c of `kStride` rows of
// the matrix. With C linears piece c meets vector c, else all meet the only one. Four lanes share a
// row, a warp has a run of eight; each warp leaves its part of the sums. Rows beyond the last one
// repeat it: no load has a condition. The first kHeldRows lie in shared memory, in kBytes of it;
// runs that are not all there are read from where they are.
template <int kOwn, int kParts, int kStride, class Where, int RB, int C, int kBytes>
struct Product {
  static constexpr int kRows = kOwn * kParts, kOfVector = kRows / C, kSteps = RB / 64;
  static constexpr int kRuns = ceil_div(kOfVector, 8);  // that meet a vector
  static constexpr Deal kDeal = best_deal(kRuns, kSteps);
  static constexpr int kSlices = kDeal.slices, kGroups = kDeal.groups;
  static constexpr int kTurns = ceil_div(kSteps, kSlices), kEach = ceil_div(kRuns, kGroups);
  static constexpr bool kKept = kTurns <= 3 && kEach > 1;  // activations, over all runs of a warp
  static constexpr int kLine = line_of(RB), kHeldRows = least(kRows, kBytes / kLine);
  static constexpr int kAhead = kHeldRows * RB, kSums = C * kRuns * 8, kLeft = kSlices * kSums;
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
  static __device__ __forceinline__ void read(uint4 (&v)[4], const u32* from) {
#pragma unroll
    for (int p = 0; p < 4; ++p) v[p] = *reinterpret_cast<const uint4*>(from + p * Where::kPlane);
  }
  static __device__ __forceinline__ void multiply(int (&sums)[4], const uint4& w,
                                                  const uint4 (&v)[4]) {
#pragma unroll
    for (int p = 0; p < 4; ++p) {
      const u32 mask = 0x03030303u << (2 * p);
      sums[p] = dot(w.x & mask, v[p].x, sums[p]);
      sums[p] = dot(w.y & mask, v[p].y, sums[p]);
      sums[p] = dot(w.z & mask, v[p].z, sums[p]);
      sums[p] = dot(w.w & mask, v[p].w, sums[p]);
    }
  }
  static __device__ __forceinline__ void run(const u32* q, int* parts, const u8* weights,
                                             const u8* held) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, t = lane & 3;
    const int slice = warp % kSlices, group = warp / kSlices;
    if (group < kGroups) {
#pragma unroll
      for (int c = 0; c < C; ++c)
        run_vector(c, slice, group, q + c * Where::kPlanes + t * 4 + slice * 16,
                   parts + slice * kSums + c * kRuns * 8, weights, held);
    }
    sync_workers();
  }
  static __device__ __forceinline__ void run_vector(int c, int slice, int group, const u32* from,
                                                    int* to, const u8* weights, const u8* held) {
    const int lane = threadIdx.x & 31, t = lane & 3;
    uint4 v[kKept ? kTurns : 1][4];
    if (kKept) {
#pragma unroll
      for (int n = 0; n < kTurns; ++n)
        if (within(n, slice)) read(v[n], from + n * kSlices * 16);
    }
#pragma unroll(kUnroll)
    for (int m = 0; m < kEach; ++m) {
      const int run = group + m * kGroups;
      if (kEach * kGroups > kRuns && run >= kRuns) break;
      const int row = c * kOfVector + min(run * 8 + (lane >> 2), kOfVector - 1);
      const bool here =
          kHeldRows == kRows || c * kOfVector + min(run * 8 + 7, kOfVector - 1) < kHeldRows;
      const u8* at = (here ? held + row * kLine : row_at(weights, row)) + slice * 64 + t * 16;
      int sums[4] = {};
#pragma unroll
      for (int n = 0; n < kTurns; ++n) {
        if (!within(n, slice)) break;
        const u8* from_here = at + n * kSlices * 64;
        const uint4 w = here ? *reinterpret_cast<const uint4*>(from_here) : load_weights(from_here);
        if (!kKept) read(v[0], from + n * kSlices * 16);
        multiply(sums, w, v[kKept ? n : 0]);
      }
      int sum = sums[0] + (sums[1] >> 2) + (sums[2] >> 4) + (sums[3] >> 6);
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      if (t == 0) to[run * 8 + (lane >> 2)] = sum;
    }
  }
  // Of a row of a piece.
  static __device__ __forceinline__ int total(const int* parts, int part, int row) {
    const int at = C == 1 ? part * kOwn + row : part * kRuns * 8 + row;
    int sum = 0;
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) sum += parts[slice * kSums + at];
    return sum;
  }
};
