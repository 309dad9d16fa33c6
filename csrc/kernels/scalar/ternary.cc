// The plain form of every kernel: what the others are tested against, and what runs where no
// vector unit is known. Prepared activations are a copy of q.
#include "kernels/ternary.h"
#include "kernels/common/float_ops.h"

namespace nomatmul {
namespace {

void unpack_row(Packing packing, const uint8_t* w, int k, int8_t* row) {
  if (packing == Packing::kTwoBit) {
    for (int e = 0; e < k; ++e) row[e] = static_cast<int8_t>(((w[e / 4] >> (e % 4 * 2)) & 3) - 1);
    return;
  }
  for (int e = 0; e < k; e += 5) {
    unsigned fraction = w[e / 5];
    for (int digit = 0; digit < 5 && e + digit < k; ++digit) {
      fraction *= 3;
      row[e + digit] = static_cast<int8_t>(static_cast<int>(fraction >> 8) - 1);
      fraction &= 255;
    }
  }
}

struct Scalar {
  static size_t prepared_bytes(Packing, int m, int k) {
    return static_cast<size_t>(m) * static_cast<size_t>(k);
  }
  static void prepare(Packing, const int8_t* q, int m, int k, int ldq, void* prepared) {
    auto* copy = static_cast<int8_t*>(prepared);
    for (int t = 0; t < m; ++t) {
      std::memcpy(copy + static_cast<size_t>(t) * k, q + static_cast<size_t>(t) * ldq,
                  static_cast<size_t>(k));
    }
  }
  static size_t scratch_bytes(Packing, int, int k) { return static_cast<size_t>(k); }

  static void product(Packing packing, const TernaryProduct& p) {
    if (p.m == 0) return;
    auto* row = static_cast<int8_t*>(p.scratch);
    for (int n = p.n0; n < p.n1; ++n) {
      unpack_row(packing, p.w + static_cast<size_t>(n) * p.row_bytes, p.k, row);
      const auto* q = static_cast<const int8_t*>(p.prepared);
      for (int t = 0; t < p.m; ++t, q += p.k) {
        int32_t acc = 0;
        for (int e = 0; e < p.k; ++e) acc += q[e] * row[e];
        const size_t at = static_cast<size_t>(t) * p.ldo + static_cast<size_t>(n);
        if (p.token_scale == nullptr) {
          static_cast<int32_t*>(p.out)[at] = acc;
        } else {
          static_cast<float*>(p.out)[at] = static_cast<float>(acc) * p.token_scale[t];
        }
      }
    }
  }
};

}  // namespace

const TernaryKernels kScalarTernary = NOMATMUL_TERNARY(Scalar);

}  // namespace nomatmul
