// The walk of trees_ops.h: logits of a few walkers at a time, and who goes where.
#pragma once

#include <cstring>

#include "kernels/common/float_vectors.h"
#include "kernels/common/plane.h"
#include "kernels/common/unroll.h"
#include "kernels/trees.h"

namespace nomatmul {
namespace {

constexpr int kSumLanes = 64;
// Walkers whose logits are made together.
constexpr int kFour = 4;

NOMATMUL_INLINE inline void fetch_line(const void* p) {
#if !defined(NOMATMUL_EMULATE)
  __builtin_prefetch(p, 0, 3);
#else
  static_cast<void>(p);
#endif
}
NOMATMUL_INLINE inline void fetch(const uint8_t* p, size_t bytes) {
  for (size_t at = 0; at < bytes; at += 64) fetch_line(p + at);
}

// The lanes of kSumLanes / kWidth vectors, folded by halves.
template <class Isa>
NOMATMUL_INLINE inline float fold_lanes(typename Isa::F (&sums)[kSumLanes / Isa::kWidth]) {
  constexpr int kCount = kSumLanes / Isa::kWidth;
  for (int half = kCount / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) sums[i] = sums[i] + sums[i + half];
  }
  float lanes[Isa::kWidth];
  std::memcpy(lanes, &sums[0], sizeof lanes);
  for (int half = Isa::kWidth / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] = lanes[i] + lanes[i + half];
  }
  return lanes[0];
}

// x is padded with zeros to a multiple of 64; a row ends where it ends.
template <class Isa, class T>
NOMATMUL_INLINE inline float dot_float(const T* row, const float* x, int k) {
  constexpr int kCount = kSumLanes / Isa::kWidth;
  typename Isa::F sums[kCount];
  unrolled<kCount>([&](auto i) NOMATMUL_INLINE { sums[i] = typename Isa::F{}; });
  const auto block = [&](const T* w, const float* v) NOMATMUL_INLINE {
    unrolled<kCount>([&](auto i) NOMATMUL_INLINE {
      sums[i] = sums[i] + Isa::load(v + i * Isa::kWidth) * Isa::load(w + i * Isa::kWidth);
    });
  };
  int e = 0;
  for (; e + kSumLanes <= k; e += kSumLanes) block(row + e, x + e);
  if (e < k) {
    T last[kSumLanes] = {};
    std::memcpy(last, row + e, static_cast<size_t>(k - e) * sizeof(T));
    block(last, x + e);
  }
  return fold_lanes<Isa>(sums);
}

template <class Isa, FffForm form>
NOMATMUL_INLINE inline float logit_of(const FffTree& tree, const FffWalker& walker, int32_t row) {
  const uint8_t* in = tree.in + static_cast<size_t>(row) * tree.stride;
  float logit;
  if constexpr (form == FffForm::kF32) {
    logit = dot_float<Isa>(reinterpret_cast<const float*>(in), static_cast<const float*>(walker.x),
                           tree.k);
  } else if constexpr (form == FffForm::kBF16) {
    logit = dot_float<Isa>(reinterpret_cast<const uint16_t*>(in),
                           static_cast<const float*>(walker.x), tree.k);
  } else if constexpr (form == FffForm::kInt8) {
    const int32_t acc = Isa::dot_int8(reinterpret_cast<const int8_t*>(in),
                                      static_cast<const typename Isa::Q*>(walker.x), tree.k);
    const float scale = tree.row_scale[2 * static_cast<size_t>(row)];
    logit = static_cast<float>(acc) * (scale * walker.step);
  } else {
    const int32_t codes = Isa::dot_ternary(in, static_cast<const int8_t*>(walker.x), tree.k);
    logit = static_cast<float>(codes - walker.sum) * (tree.scale_in * walker.step);
  }
  return tree.bias == nullptr ? logit : logit + tree.bias[row];
}

// Logits of four walkers; int8 and ternary rows.
template <class Isa, FffForm form>
NOMATMUL_INLINE inline void logits_of(const FffTree& tree, FffWalker* const (&walkers)[kFour],
                                      const int32_t (&rows)[kFour], float (&logits)[kFour]) {
  const auto in_row = [&](int i) { return tree.in + static_cast<size_t>(rows[i]) * tree.stride; };
  if constexpr (form == FffForm::kInt8) {
    const int8_t* w[kFour];
    const typename Isa::Q* q[kFour];
    for (int i = 0; i < kFour; ++i) {
      w[i] = reinterpret_cast<const int8_t*>(in_row(i));
      q[i] = static_cast<const typename Isa::Q*>(walkers[i]->x);
    }
    int32_t acc[kFour];
    Isa::four_int8(w, q, tree.k, acc);
    for (int i = 0; i < kFour; ++i) {
      const float scale = tree.row_scale[2 * static_cast<size_t>(rows[i])];
      logits[i] = static_cast<float>(acc[i]) * (scale * walkers[i]->step);
    }
  } else {
    const uint8_t* w[kFour];
    const int8_t* q[kFour];
    for (int i = 0; i < kFour; ++i) {
      w[i] = in_row(i);
      q[i] = static_cast<const int8_t*>(walkers[i]->x);
    }
    int32_t codes[kFour];
    Isa::four_ternary(w, q, tree.k, codes);
    for (int i = 0; i < kFour; ++i) {
      const int32_t acc = codes[i] - walkers[i]->sum;
      logits[i] = static_cast<float>(acc) * (tree.scale_in * walkers[i]->step);
    }
  }
  if (tree.bias == nullptr) return;
  for (int i = 0; i < kFour; ++i) logits[i] = logits[i] + tree.bias[rows[i]];
}

template <class Isa, FffForm form>
void walk_form(const FffTree& tree, FffWalker* walkers, int count, int from, int to,
               FffFetch wanted) {
  constexpr int kGroup = form == FffForm::kInt8 || form == FffForm::kTernary ? kFour : 1;
  const auto in_row = [&](int32_t row) { return tree.in + static_cast<size_t>(row) * tree.stride; };
  for (int level = from; level < to; ++level) {
    const bool more = level + 1 < to;
    for (int first = 0; first < count; first += kGroup) {
      const int there = at_most(kGroup, count - first);
      FffWalker* group[kGroup];
      int32_t rows[kGroup];
      float logits[kGroup];
      for (int i = 0; i < there; ++i) {
        group[i] = walkers + first + i;
        rows[i] = group[i]->base + group[i]->node;
        if (wanted.both && more) {
          const uint8_t* left = in_row(rows[i] + group[i]->node + 1);
          fetch(left, tree.side_bytes);
          fetch(left + tree.stride, tree.side_bytes);
        }
        if (wanted.out) {
          fetch(tree.out + static_cast<size_t>(rows[i]) * tree.stride, tree.side_bytes);
        }
      }
      if (kGroup > 1 && there == kGroup) {
        if constexpr (kGroup > 1) logits_of<Isa, form>(tree, group, rows, logits);
      } else {
        for (int i = 0; i < there; ++i) logits[i] = logit_of<Isa, form>(tree, *group[i], rows[i]);
      }
      for (int i = 0; i < there; ++i) {
        FffWalker& walker = *group[i];
        walker.logits[level] = logits[i];
        walker.rows[level] = rows[i];
        walker.node = 2 * walker.node + 1 + (logits[i] > 0.0f ? 1 : 0);
        if (!wanted.both && more) fetch(in_row(walker.base + walker.node), tree.side_bytes);
      }
    }
  }
}

template <class Isa>
void walk_trees(const FffTree& tree, FffWalker* walkers, int count, int from, int to,
                FffFetch fetch) {
  switch (tree.form) {
    case FffForm::kF32:
      return walk_form<Isa, FffForm::kF32>(tree, walkers, count, from, to, fetch);
    case FffForm::kBF16:
      return walk_form<Isa, FffForm::kBF16>(tree, walkers, count, from, to, fetch);
    case FffForm::kInt8:
      return walk_form<Isa, FffForm::kInt8>(tree, walkers, count, from, to, fetch);
    case FffForm::kTernary:
      return walk_form<Isa, FffForm::kTernary>(tree, walkers, count, from, to, fetch);
  }
}

}  // namespace
}  // namespace nomatmul
