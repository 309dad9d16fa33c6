// What lies where in decode.cu: its parameters, the words that blocks wait for, shared memory, and
// the products of a model's matrices.
#pragma once

#include "decode_product.cuh"

constexpr int kOwnD = ceil_div(D, BLOCKS), kOwnM = ceil_div(M, BLOCKS), kOwnV = ceil_div(V, BLOCKS);
static_assert(kOwnD <= kThreads && kOwnM <= kThreads,
              "this chip has too few multiprocessors for a model so wide");
typedef Vector<D, RBD> VectorD;
typedef Vector<M ? M : 16, M ? RBM : 64> VectorM;
// Words of a set that blocks wait for: g and its gate, x behind o and behind down, inner values.
constexpr int kSets = 3, kAtG = 0, kAtX = 2 * VectorD::kPad;
constexpr int kAtNext = M ? 3 * VectorD::kPad : kAtX;  // what the next layer takes
constexpr int kAtY = 4 * VectorD::kPad, kSet = kAtY + (M ? VectorM::kPad : 0);

struct Params {
  const u8* embedding;
  const float* embedding_scale;
  const u8 *ifg, *o, *gate, *down, *head;
  const float *mixer_norm, *ifg_norm, *g_norm, *o_norm;
  const float* bound;
  const float *channel_norm, *gate_norm, *down_norm, *final_norm, *head_norm;
  const float* w_scale;  // [L][6] of i, f, g, o, gate, down; then the head's
  const float* state_in;
  float* state_out;
  float* logits;
  const int* token_in;
  int* token_out;
  u32* items;
  u64* best;
  u32* arrived;
  int* flag;
  int set;    // which the first layer takes
  int token;  // the token, or -1: it is what *token_in holds (the launch before made it)
};

struct Shared {
  alignas(16) u32 q_d[3 * VectorD::kPlanes];
  alignas(16) u32 q_m[VectorM::kPlanes];
  Reduction reduction;
  float w_scale[6 * L + 1];
  alignas(8) u64 norms[2], rows[2];  // barriers that copies of even and of odd phases arrive at
};
constexpr int kSmall = ceil_div((int)sizeof(Shared), 16) * 16;
// What products leave for each slice of the columns: rounded up, they are not known yet.
constexpr int kMostSums =
    largest(24 * ceil_div(kOwnD, 8), 8 * largest(ceil_div(2 * kOwnM, 8), ceil_div(kOwnV, 8)));
constexpr int kPartsBytes = 4 * kMostSums * kWarps;
constexpr int kEvenNorms = 4 * VectorD::kPad;
constexpr int kOddNorms = largest(2 * VectorD::kPad, M ? VectorM::kPad : 0);
// Bytes of weights that are copied ahead in even and in odd phases: all but the head's, if they
// fit.
constexpr int kRoom = SHARED_LIMIT - kSmall - (kEvenNorms + kOddNorms) * 4 - kPartsBytes - 64;
constexpr int kOddNeed = kOwnD * largest(line_of(RBD), M ? line_of(RBM) : 0);
constexpr int kEvenNeed = largest(3 * kOwnD, M ? 2 * kOwnM : 0) * line_of(RBD);
constexpr bool kAllHeld = kOddNeed + kEvenNeed <= kRoom;
constexpr int kOddBytes = kAllHeld ? kOddNeed : least(kOddNeed, kRoom / 3 / 64 * 64);
constexpr int kEvenBytes =
    least(largest(kEvenNeed, kOwnV* line_of(RBD)), (kRoom - kOddBytes) / 64 * 64);
static_assert(kRoom >= 0, "this chip has too little shared memory for a model so wide");
// Copies on their way: of even and of odd phases.
struct Copies {
  alignas(16) float even_norms[kEvenNorms], odd_norms[kOddNorms];
  alignas(16) u8 even[kEvenBytes + 16], odd[kOddBytes + 16];
};

using ProductI = Product<kOwnD, 3, D, VectorD, RBD, 3, kEvenBytes>;
using ProductO = Product<kOwnD, 1, D, VectorD, RBD, 1, kOddBytes>;
using ProductH = Product<kOwnV, 1, V, VectorD, RBD, 1, kEvenBytes>;
#if M > 0
using ProductG = Product<kOwnM, 2, M, VectorD, RBD, 1, kEvenBytes>;
using ProductD = Product<kOwnD, 1, D, VectorM, RBM, 1, kOddBytes>;
#endif
constexpr int kLeft = largest(largest(ProductI::kLeft, largest(ProductO::kLeft, ProductH::kLeft)),
#if M > 0
                              largest(ProductG::kLeft, ProductD::kLeft)
#else
                              0
#endif
);
static_assert(kLeft * 4 <= kPartsBytes, "parts of sums find no room");
extern "C" __constant__ int shared_bytes = kSmall + sizeof(Copies) + kPartsBytes;

struct Weights {  // of a layer
  const u8 *i, *o, *gate, *down;
  __device__ __forceinline__ Weights(const Params& p, int layer)
      : i(p.ifg + (size_t)layer * 3 * D * RBD),
        o(p.o + (size_t)layer * D * RBD),
        gate(p.gate + (size_t)layer * 2 * M * RBD),
        down(p.down + (size_t)layer * D * RBM) {}
};

__device__ __forceinline__ float embedded(const Params& p, int token, int e) {
  const size_t at = (size_t)token * D + e;
  if (EMBEDDING == 0)
    return __uint_as_float((u32) reinterpret_cast<const unsigned short*>(p.embedding)[at] << 16);
  if (EMBEDDING == 1)
    return (float)reinterpret_cast<const signed char*>(p.embedding)[at] * p.embedding_scale[token];
  return reinterpret_cast<const float*>(p.embedding)[at];
}
