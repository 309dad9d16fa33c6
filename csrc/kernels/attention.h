// Softmax attention of causal models over a paged cache of keys and values: one table of function
// pointers per instruction set, the same bits on each of them.
//
// A page holds kPagePositions positions of a sequence. In it each layer and key-value head has a
// strip: keys [E][positions], so that a score is no horizontal sum, values [positions][E padded
// to 16], and, of int8, the scale of each key and of each value, float32 [positions] each.
//
// Legend: E head size.
#pragma once

#include <cstddef>
#include <cstdint>

namespace nomatmul {

constexpr int kPagePositions = 64;

// How keys and values are kept: float16, int8 with a scale a position and head, or float32.
enum class KvForm : int { kHalf = 0, kInt8 = 1, kFloat = 2 };

// How a strip is laid out.
struct StripLayout {
  int head_size = 0;
  KvForm form = KvForm::kHalf;

  bool scaled() const { return form == KvForm::kInt8; }
  size_t width() const { return form == KvForm::kInt8 ? 1 : form == KvForm::kHalf ? 2 : 4; }
  size_t padded() const { return (static_cast<size_t>(head_size) + 15) / 16 * 16; }
  size_t values() const { return head_size * width() * kPagePositions; }       // offset
  size_t value_bytes() const { return padded() * width(); }                    // of a position
  size_t scales() const { return values() + value_bytes() * kPagePositions; }  // offset
  size_t bytes() const { return scales() + (scaled() ? 2 * kPagePositions * sizeof(float) : 0); }
};

// Query rows of one key-value head: row r sees positions 0 .. lengths[r] - 1 and
//   score[s] = (fma chain over e, from 0, of q[e] * k[s][e]) * scale
//   w[s] = exp(score[s] - largest score), 0 where the difference is below -88
//   out[e] = (fma chain over s, from 0, of w[s] * v[s][e]) / sum of w
// The sum runs in 16 lanes (position s in lane s % 16), which are folded by halves.
struct AttentionRows {
  StripLayout layout;
  const uint8_t* const* pages;
  size_t strip;  // where the strip begins in each page
  int rows;      // at most kMaxAttentionRows
  const float* const* q;
  float* const* out;
  const int* lengths;  // rising, at least 1
  float scale;
  float* scratch;  // attention_scratch(), 64-byte aligned
};

constexpr int kMaxAttentionRows = 16;

// Floats of scratch for rows of which the longest sees so many positions.
inline size_t attention_scratch(const StripLayout& layout, int rows, int length) {
  const size_t positions = (static_cast<size_t>(length) + kPagePositions - 1) / kPagePositions;
  const size_t queries = static_cast<size_t>(rows) * layout.head_size;
  return rows * (positions * kPagePositions + layout.padded()) + (queries + 15) / 16 * 16;
}

struct AttentionKernels {
  void (*attend)(const AttentionRows&);
  // Puts k and v [E] into a strip as its position `slot`. False where they are not finite there.
  bool (*keep)(const StripLayout&, uint8_t* strip, int slot, const float* k, const float* v);
};

// Each is defined in <isa>/attention.cc; AMX has none of its own.
extern const AttentionKernels kScalarAttention, kAvx2Attention, kAvx512VnniAttention,
    kNeonAttention;

}  // namespace nomatmul
