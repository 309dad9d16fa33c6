// One product of ternary rows in one go, for tests and tools.
#pragma once

#include <algorithm>
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

// The product of q [m, k].
inline void whole_product(const TernaryKernels& kernels, Packing packing, const int8_t* q,
                          TernaryProduct product) {
  const int m = product.m, k = product.k;
  const ExactBuffer prepared(kernels.prepared_bytes(packing, m, k));
  const ExactBuffer scratch(kernels.scratch_bytes(packing, m, k));
  kernels.prepare(packing, q, m, k, k, prepared.data());
  product.prepared = prepared.data(), product.scratch = scratch.data();
  kernels.product(packing, product);
}

}  // namespace nomatmul
