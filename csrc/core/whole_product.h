// One product of ternary rows in one go, for tests and tools.
#pragma once

#include <new>

#include "kernels/ternary.h"

namespace nomatmul {

// 64-byte aligned memory with an exact end, so that AddressSanitizer sees each step past it.
class ExactBuffer {
 public:
  explicit ExactBuffer(size_t bytes) : data_(::operator new(bytes, std::align_val_t{64})) {}
  ~ExactBuffer() { ::operator delete(data_, std::align_val_t{64}); }
  ExactBuffer(const ExactBuffer&) = delete;
  ExactBuffer& operator=(const ExactBuffer&) = delete;
  void* data() const { return data_; }

 private:
  void* data_;
};

// The product of q [m, k], as TernaryKernels::product() gives it.
inline void whole_product(const TernaryKernels& kernels, Packing packing, const uint8_t* w,
                          size_t row_bytes, int n0, int n1, const int8_t* q, int m, int k,
                          const float* token_scale, void* out, size_t ldo) {
  const ExactBuffer prepared(kernels.prepared_bytes(packing, m, k));
  const ExactBuffer scratch(kernels.scratch_bytes(packing, m, k));
  kernels.prepare(packing, q, m, k, k, prepared.data());
  kernels.product(packing, w, row_bytes, n0, n1, prepared.data(), m, k, token_scale, out, ldo,
                  scratch.data());
}

}  // namespace nomatmul
