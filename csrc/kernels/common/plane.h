// The layout of prepared activations that all vector kernels share, and how results are written.
//
// A vector of kVec packed bytes holds `planes` values a byte (4 in the 2-bit form, 5 in base 3):
// plane p of the vector is elements planes * j + p for j < kVec. Kernels take planes apart
// by shifts or multiplications, never by shuffles, so prepare() reorders q instead:
//   q_planes[(block * planes + p) * kVec + j] = q[(block * kVec + j) * planes + p], 0 beyond k.
// A "step" is one plane of one block: kVec codes against kVec activations.
//
// Codes are value + 1, so a kernel sums code * q and the sum of q is taken off at the end.
// Padding needs no care in the kernels: its q is 0.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels/ternary.h"

namespace nomatmul {
namespace {

constexpr int planes_of(Packing packing) { return packing == Packing::kTwoBit ? 4 : 5; }
constexpr size_t round_up(size_t value, size_t step) { return (value + step - 1) / step * step; }
constexpr int at_most(int a, int b) { return a < b ? a : b; }

// Where things lie in the prepared buffer: m sums of q, then m rows of bytes_per_token.
struct PlaneLayout {
  int planes, blocks, steps;
  size_t bytes_per_token, sums_bytes;

  PlaneLayout(Packing packing, int vec, int m, int k)
      : planes(planes_of(packing)),
        blocks((k + planes * vec - 1) / (planes * vec)),
        steps(blocks * planes),
        bytes_per_token(static_cast<size_t>(steps) * static_cast<size_t>(vec)),
        sums_bytes(round_up(static_cast<size_t>(m) * sizeof(int32_t), 64)) {}

  size_t bytes(int m) const { return sums_bytes + static_cast<size_t>(m) * bytes_per_token; }
};

inline int32_t sum_of(const int8_t* q, int k) {
  int32_t sum = 0;
  for (int e = 0; e < k; ++e) sum += q[e];
  return sum;
}

// One whole block: kVec * kPlanes elements into kPlanes planes.
template <int kVec, int kPlanes>
inline void split_planes(const int8_t* q, int8_t* planes) {
  if constexpr (kPlanes == 4) {  // through 32-bit words: compilers vectorise this form
    for (int p = 0; p < 4; ++p) {
      for (int j = 0; j < kVec; ++j) {
        uint32_t word;
        std::memcpy(&word, q + 4 * j, sizeof word);
        planes[p * kVec + j] = static_cast<int8_t>(word >> (8 * p));
      }
    }
  } else {
    for (int j = 0; j < kVec; ++j) {
      for (int p = 0; p < kPlanes; ++p) planes[p * kVec + j] = q[kPlanes * j + p];
    }
  }
}

template <int kVec, int kPlanes>
inline void split_row(const int8_t* q, int k, int8_t* planes) {
  constexpr int kBlock = kVec * kPlanes;
  int e = 0;
  for (; e + kBlock <= k; e += kBlock) split_planes<kVec, kPlanes>(q + e, planes + e);
  if (e < k) {
    int8_t last[kBlock] = {};
    std::memcpy(last, q + e, static_cast<size_t>(k - e));
    split_planes<kVec, kPlanes>(last, planes + e);
  }
}

// The same, each four bytes `stride` bytes behind those before.
template <int kVec, int kPlanes>
inline void spread_row(const int8_t* q, int k, uint8_t* to, size_t stride) {
  constexpr int kBlock = kVec * kPlanes;
  for (int e = 0; e < k; e += kBlock) {
    int8_t planes[kBlock];
    if (e + kBlock > k) std::memset(planes, 0, sizeof planes);
    split_row<kVec, kPlanes>(q + e, at_most(kBlock, k - e), planes);
    for (int word = 0; word < kBlock; word += 4, to += stride) std::memcpy(to, planes + word, 4);
  }
}

template <int kVec>
void prepare_planes(Packing packing, const int8_t* q, int m, int k, int ldq, void* prepared) {
  const PlaneLayout layout(packing, kVec, m, k);
  auto* bytes = static_cast<uint8_t*>(prepared);
  for (int t = 0; t < m; ++t) {
    const int8_t* q_t = q + static_cast<size_t>(t) * static_cast<size_t>(ldq);
    const int32_t sum = sum_of(q_t, k);
    std::memcpy(bytes + static_cast<size_t>(t) * sizeof sum, &sum, sizeof sum);
    auto* row = reinterpret_cast<int8_t*>(bytes + layout.sums_bytes +
                                          static_cast<size_t>(t) * layout.bytes_per_token);
    if (packing == Packing::kTwoBit) {
      split_row<kVec, 4>(q_t, k, row);
    } else {
      split_row<kVec, 5>(q_t, k, row);
    }
  }
}

// One product, its activations in planes.
struct Operands : TernaryProduct {
  PlaneLayout layout;
  const int32_t* sums;  // [m]
  const int8_t* q;      // [m, bytes_per_token] in planes

  Operands(Packing packing, int vec, const TernaryProduct& product)
      : TernaryProduct(product),
        layout(packing, vec, m, k),
        sums(static_cast<const int32_t*>(prepared)),
        q(static_cast<const int8_t*>(prepared) + layout.sums_bytes) {}

  const uint8_t* row(int n) const { return w + static_cast<size_t>(n) * row_bytes; }
  // count rows from n on; beyond them the last one again, whose result is dropped.
  template <int kRows>
  void rows_from(int n, int count, const uint8_t* (&rows)[kRows]) const {
    for (int r = 0; r < kRows; ++r) rows[r] = row(n + at_most(r, count - 1));
  }
  const int8_t* token(int t) const { return q + static_cast<size_t>(t) * layout.bytes_per_token; }

  // Writes count results of token t from row n on, given their sums of code * q.
  void write(int t, int n, const int32_t* code_sums, int count) const {
    const size_t at = static_cast<size_t>(t) * ldo + static_cast<size_t>(n);
    if (token_scale == nullptr) {
      int32_t* to = static_cast<int32_t*>(out) + at;
      for (int r = 0; r < count; ++r) to[r] = code_sums[r] - sums[t];
    } else {
      float* to = static_cast<float*>(out) + at;
      for (int r = 0; r < count; ++r) {
        to[r] = static_cast<float>(code_sums[r] - sums[t]) * token_scale[t];
      }
    }
  }
};

}  // namespace
}  // namespace nomatmul
