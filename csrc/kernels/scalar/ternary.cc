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

  static void product(Packing packing, const uint8_t* w, size_t row_bytes, int n0, int n1,
                      const void* prepared, int m, int k, const float* token_scale, void* out,
                      size_t ldo, void* scratch) {
    if (m == 0) return;
    const auto* q = static_cast<const int8_t*>(prepared);
    auto* row = static_cast<int8_t*>(scratch);
    for (int n = n0; n < n1; ++n) {
      unpack_row(packing, w + static_cast<size_t>(n) * row_bytes, k, row);
      for (int t = 0; t < m; ++t) {
        const int8_t* q_t = q + static_cast<size_t>(t) * k;
        int32_t acc = 0;
        for (int e = 0; e < k; ++e) acc += q_t[e] * row[e];
        const size_t at = static_cast<size_t>(t) * ldo + static_cast<size_t>(n);
        if (token_scale == nullptr) {
          static_cast<int32_t*>(out)[at] = acc;
        } else {
          static_cast<float*>(out)[at] = static_cast<float>(acc) * token_scale[t];
        }
      }
    }
  }
};

}  // namespace

const TernaryKernels kScalarTernary = NOMATMUL_TERNARY(Scalar);

}  // namespace nomatmul
