// The attention of kernels/attention.h, written once. A file that includes this hands a struct with
// the primitives of its instruction set to NOMATMUL_ATTENTION:
//   W                                  16 floats
//   kTile                              vectors W of sums beside each of 4 rows in registers
//   zero() load(p) store(p, W)
//   broadcast(float)  multiply(W, W)   fma(W, W, W): a * b + c, rounded once
//   halves(const uint16_t*)            float16 to W; bytes(const int8_t*): int8 to W
//   to_halves(const float*, uint16_t*) 16 of them, to nearest even
//
// Rows of one token share their keys and values; a page is read from memory once and is in a near
// cache for all of them. While the first rows work on a page, the next one is prefetched, as many
// bytes in each step of a tile as the step reads, so that memory is never asked for more at once.
#pragma once

#include <algorithm>
#include <limits>
#include <type_traits>

#include "kernels/attention.h"
#include "kernels/common/attention_keep.h"
#include "kernels/common/float_vectors.h"
#include "kernels/common/unroll.h"

namespace nomatmul {
namespace {

constexpr int kAttentionRows = 4;  // of a register tile

template <class Isa, KvForm kForm>
struct Attention {
  using W = typename Isa::W;
  static constexpr bool kInt8 = kForm == KvForm::kInt8;
  using Stored = std::conditional_t<kInt8, int8_t,
                                    std::conditional_t<kForm == KvForm::kHalf, uint16_t, float>>;
  static constexpr size_t kStepBytes = Isa::kTile * kWide * sizeof(Stored);

  // step(i) for i in [from, to); `ahead`: what the first step prefetches, or nullptr: nothing. step
  // stands here once: in two places it would not be inlined, and its sums would live in memory.
  template <class Step>
  static NOMATMUL_INLINE void each_step(int from, int to, const uint8_t* ahead,
                                        const void* anything, Step step) {
    const size_t stride = ahead == nullptr ? 0 : kStepBytes;
    if (ahead == nullptr) ahead = static_cast<const uint8_t*>(anything);
    for (int i = from; i < to; ++i, ahead += stride) {
      unrolled<std::max<int>(1, kStepBytes / 64)>(
          [&](auto line) { __builtin_prefetch(ahead + 64 * line, 0, 2); });
      step(i);
    }
  }

  static NOMATMUL_INLINE W widened(const Stored* p) {
    if constexpr (kInt8) {
      return Isa::bytes(p);
    } else if constexpr (kForm == KvForm::kHalf) {
      return Isa::halves(p);
    } else {
      return Isa::load(p);
    }
  }

  // scores[r * ld + s] of kR rows and 16 * kB positions; queries [E][kR].
  template <int kR, int kB>
  static void scores(const Stored* keys, const float* key_scales, int e, const float* queries,
                     float scale, float* to, size_t ld, const uint8_t* ahead) {
    W sums[kR][kB], steps[kB];
    unrolled<kR>([&](auto r) { unrolled<kB>([&](auto b) { sums[r][b] = Isa::zero(); }); });
    if constexpr (kInt8) {
      unrolled<kB>([&](auto b) { steps[b] = Isa::load(key_scales + kWide * b); });
    }
    const Stored* from = keys;
    each_step(0, e, ahead, keys, [&](int) {
      W key[kB];
      unrolled<kB>([&](auto b) {
        key[b] = widened(from + kWide * b);
        if constexpr (kInt8) key[b] = Isa::multiply(key[b], steps[b]);
      });
      unrolled<kR>([&](auto r) {
        const W query = Isa::broadcast(queries[r]);
        unrolled<kB>([&](auto b) { sums[r][b] = Isa::fma(query, key[b], sums[r][b]); });
      });
      from += kPagePositions;
      queries += kR;
    });
    const W factor = Isa::broadcast(scale);
    unrolled<kR>([&](auto r) {
      unrolled<kB>(
          [&](auto b) { Isa::store(to + r * ld + kWide * b, Isa::multiply(sums[r][b], factor)); });
    });
  }

  // sums[r * lds ..] += weights[r * ld + s] * values[s] of 16 * kB columns, s in [from, to).
  template <int kR, int kB>
  static void values(const Stored* values, size_t stride, const float* value_scales, int from,
                     int to, const float* weights, size_t ld, float* sums, size_t lds,
                     const uint8_t* ahead) {
    W sum[kR][kB];
    unrolled<kR>([&](auto r) {
      unrolled<kB>([&](auto b) { sum[r][b] = Isa::load(sums + r * lds + kWide * b); });
    });
    each_step(from, to, ahead, values, [&](int s) {
      W value[kB];
      unrolled<kB>([&](auto b) {
        value[b] = widened(values + s * stride + kWide * b);
        if constexpr (kInt8) {
          value[b] = Isa::multiply(value[b], Isa::broadcast(value_scales[s]));
        }
      });
      unrolled<kR>([&](auto r) {
        const W weight = Isa::broadcast(weights[r * ld + s]);
        unrolled<kB>([&](auto b) { sum[r][b] = Isa::fma(weight, value[b], sum[r][b]); });
      });
    });
    unrolled<kR>([&](auto r) {
      unrolled<kB>([&](auto b) { Isa::store(sums + r * lds + kWide * b, sum[r][b]); });
    });
  }

  // Calls work.run<kR, kB>() for the numbers at run time, 1 to 4 rows and 1 to kTile vectors.
  template <class Work, int kR = kAttentionRows, int kB = Isa::kTile>
  static NOMATMUL_INLINE void tile(int rows, int vectors, const Work& work) {
    if constexpr (kR > 1) {
      if (rows < kR) return tile<Work, kR - 1, kB>(rows, vectors, work);
    }
    if constexpr (kB > 1) {
      if (vectors < kB) return tile<Work, kR, kB - 1>(rows, vectors, work);
    }
    work(std::integral_constant<int, kR>{}, std::integral_constant<int, kB>{});
  }

  explicit Attention(const AttentionRows& task)
      : task(task),
        e(task.layout.head_size),
        padded(task.layout.padded()),
        longest(task.lengths[task.rows - 1]),
        pages((longest + kPagePositions - 1) / kPagePositions),
        ld(static_cast<size_t>(pages) * kPagePositions),
        weights(task.scratch),
        sums(weights + task.rows * ld),
        queries(sums + task.rows * padded) {}

  // Rows of the register tiles: as equal as can be.
  int tile_rows() const {
    const int tiles = (task.rows + kAttentionRows - 1) / kAttentionRows;
    return (task.rows + tiles - 1) / tiles;
  }
  const uint8_t* strip(int page) const { return task.pages[page] + task.strip; }
  const float* scales(int page, int which) const {
    return reinterpret_cast<const float*>(strip(page) + task.layout.scales()) +
           which * kPagePositions;
  }

  void all_scores() const {
    const int step = tile_rows();
    for (int first = 0; first < task.rows; first += step) {  // [E][rows] of each tile
      const int rows = std::min(step, task.rows - first);
      float* to = queries + static_cast<size_t>(first) * e;
      for (int i = 0; i < e; ++i) {
        for (int r = 0; r < rows; ++r) *to++ = task.q[first + r][i];
      }
    }
    for (int page = 0; page < pages; ++page) {
      const auto* keys = reinterpret_cast<const Stored*>(strip(page));
      const bool last = page + 1 == pages;
      const uint8_t* next = last ? strip(0) + task.layout.values() : strip(page + 1);
      for (int first = 0; first < task.rows; first += step) {
        const int rows = std::min(step, task.rows - first);
        const int positions =
            std::min(kPagePositions, task.lengths[first + rows - 1] - page * kPagePositions);
        for (int s = 0; s < positions; s += kWide * Isa::kTile) {
          const int vectors = std::min(Isa::kTile, (positions - s + kWide - 1) / kWide);
          const uint8_t* ahead =
              first > 0 ? nullptr : next + s / kWide / Isa::kTile * e * kStepBytes;
          tile(rows, vectors, [&](auto r, auto b) {
            scores<r, b>(keys + s, scales(page, 0) + s, e, queries + static_cast<size_t>(first) * e,
                         task.scale, weights + first * ld + page * kPagePositions + s, ld, ahead);
          });
        }
      }
    }
  }

  // Scores to weights; returns their sum.
  float softmax(float* s, int length) const {
    const int whole = (length + kWide - 1) / kWide * kWide;
    std::fill(s + length, s + whole, -std::numeric_limits<float>::infinity());
    F8 top = splat(-std::numeric_limits<float>::infinity());
    for (int i = 0; i < whole; i += kLanes) top = larger(load8(s + i), top);
    const F8 peak = splat(fold_max(top)), least = splat(-88.0f);
    F8 low = splat(0.0f), high = splat(0.0f);
    const auto weight = [&](int i) {
      const F8 x = load8(s + i) - peak;
      const F8 power = exp_poly(x < least ? least : x);  // a NaN stays one
      const F8 kept = x < least ? splat(0.0f) : power;
      store8(s + i, kept);
      return kept;
    };
    for (int i = 0; i < whole; i += kWide) {
      low = low + weight(i);
      high = high + weight(i + kLanes);
    }
    return fold_sum(low + high);
  }

  void add_values(int page, int first, int rows, int from, int to, bool fetching) const {
    const auto* all = reinterpret_cast<const Stored*>(strip(page) + task.layout.values());
    // behind the last page, the keys of the head that a thread is likely to take next
    const uint8_t* next =
        page + 1 < pages ? strip(page + 1) + task.layout.values() : strip(0) + task.layout.bytes();
    const size_t vectors = padded / kWide;
    for (size_t at = 0; at < vectors; at += Isa::kTile) {
      const int some = static_cast<int>(std::min<size_t>(Isa::kTile, vectors - at));
      const size_t done = at / Isa::kTile * kPagePositions + from;
      const uint8_t* ahead = fetching ? next + done * kStepBytes : nullptr;
      tile(rows, some, [&](auto r, auto b) {
        values<r, b>(all + at * kWide, padded, scales(page, 1), from, to,
                     weights + first * ld + page * kPagePositions, ld,
                     sums + first * padded + at * kWide, padded, ahead);
      });
    }
  }

  void all_values() const {
    std::fill(sums, sums + task.rows * padded, 0.0f);
    const int step = tile_rows();
    for (int page = 0; page < pages; ++page) {
      const int begin = page * kPagePositions;
      const auto inside = [&](int position) {
        return std::clamp(position - begin, 0, kPagePositions);
      };
      for (int first = 0; first < task.rows; first += step) {
        const int rows = std::min(step, task.rows - first);
        // What all rows of the tile see, then, of rows that see more, the rest of each.
        const int common = inside(task.lengths[first]);
        if (common > 0) add_values(page, first, rows, 0, common, first == 0);
        for (int r = first + 1; r < first + rows; ++r) {
          const int end = inside(task.lengths[r]);
          if (end > common) add_values(page, r, 1, common, end, false);
        }
      }
    }
  }

  void run() const {
    all_scores();
    float total[kMaxAttentionRows];
    for (int r = 0; r < task.rows; ++r) total[r] = softmax(weights + r * ld, task.lengths[r]);
    all_values();
    for (int r = 0; r < task.rows; ++r) {
      const float* from = sums + r * padded;
      const F8 divisor = splat(total[r]);
      float* to = task.out[r];
      for_each_8(e, [&](int i, auto load, auto store) { store(to + i, load(from + i) / divisor); });
    }
  }

  const AttentionRows& task;
  const int e;
  const size_t padded;
  const int longest, pages;
  const size_t ld;
  float *weights, *sums, *queries;
};

template <class Isa>
void attend(const AttentionRows& task) {
  switch (task.layout.form) {
    case KvForm::kHalf:
      return Attention<Isa, KvForm::kHalf>(task).run();
    case KvForm::kInt8:
      return Attention<Isa, KvForm::kInt8>(task).run();
    case KvForm::kFloat:
      return Attention<Isa, KvForm::kFloat>(task).run();
  }
}

}  // namespace
}  // namespace nomatmul

#define NOMATMUL_ATTENTION(Isa) {attend<Isa>, keep<Isa>}
