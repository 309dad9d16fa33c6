// The causal attention of one sequence from its plain arrays, on the calling thread: for tests.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "core/memory.h"
#include "core/pages.h"

namespace nomatmul {

struct WholeAttention {
  int heads, kv_heads, head_size;
  int tokens, positions;  // the tokens are the last ones of the positions
  KvForm form;
  int rows;                // at once, at most kMaxAttentionRows
  const float *q, *k, *v;  // [tokens, heads, E], [positions, kv_heads, E]
  float* out;              // [tokens, heads, E]
};

// False where a key or value is not finite; out is not written then.
inline bool whole_attention(const AttentionKernels& kernels, const WholeAttention& whole) {
  const int e = whole.head_size, group = whole.heads / whole.kv_heads;
  const StripLayout strip{e, whole.form};
  Pages pages(PageLayout{strip, whole.kv_heads, 1});
  pages.reserve(whole.positions);
  bool finite = true;
  for (int p = 0; p < whole.positions; ++p) {
    for (int head = 0; head < whole.kv_heads; ++head) {
      const size_t at = (static_cast<size_t>(p) * whole.kv_heads + head) * e;
      finite = kernels.keep(strip, pages.strip(p, 0, head), p % kPagePositions, whole.k + at,
                            whole.v + at) &&
               finite;
    }
  }
  if (!finite) return false;
  Block scratch(attention_scratch(strip, whole.rows, whole.positions) * sizeof(float));
  const float scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(e)));
  const int all = whole.tokens * group;
  for (int head = 0; head < whole.kv_heads; ++head) {
    for (int first = 0; first < all; first += whole.rows) {
      const float* q[kMaxAttentionRows];
      float* out[kMaxAttentionRows];
      int lengths[kMaxAttentionRows];
      const int rows = std::min(whole.rows, all - first);
      for (int r = 0; r < rows; ++r) {
        const int token = (first + r) / group, member = (first + r) % group;
        const size_t at = (static_cast<size_t>(token) * whole.heads + head * group + member) * e;
        q[r] = whole.q + at;
        out[r] = whole.out + at;
        lengths[r] = whole.positions - whole.tokens + token + 1;
      }
      kernels.attend({strip, pages.addresses().data(), pages.layout().offset(0, head), rows, q, out,
                      lengths, scale, scratch.as<float>()});
    }
  }
  return true;
}

}  // namespace nomatmul
