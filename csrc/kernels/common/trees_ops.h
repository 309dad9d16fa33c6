// The conditional kernels, written once over a type `Isa` that each <isa>/trees.cc defines:
//   kWidth                     floats of a vector
//   F                          the compiler's vector of kWidth floats
//   load(const float*), load(const uint16_t* bfloat16 bits), load(const int8_t*)   -> F
//   Q                          of the int8 inputs that it multiplies: int8_t or int16_t
//   dot_int8(const int8_t* row, const Q* x, int k)                              -> int32_t
//   ternary_bytes(k), ternary_prepare(q, k, prepared)
//   dot_ternary(const uint8_t* row, const int8_t* prepared, int k)   -> sum of code * q
//   four_int8(rows, x, k, out), four_ternary(rows, x, k, out)        four of these at once
//   combine_ternary(...)       as in the table, of code * q
#pragma once

#include <cstring>

#include "kernels/common/float_vectors.h"
#include "kernels/common/plane.h"
#include "kernels/common/trees_walk.h"
#include "kernels/common/unroll.h"
#include "kernels/trees.h"

namespace nomatmul {
namespace {

template <class Isa>
NOMATMUL_INLINE inline typename Isa::F splat_f(float v) {
  return typename Isa::F{} + v;
}

// Eight vectors of columns at a time stay in registers while all rows are added to them.
template <class Isa, class T>
void combine_rows(const FffTree& tree, const int32_t* rows, const float* coefficient, int count,
                  float* y, int from, int to, bool add, const int32_t* next) {
  constexpr int kVectors = 8, kColumns = kVectors * Isa::kWidth;
  const auto row_at = [&](int32_t row, int c) NOMATMUL_INLINE {
    return reinterpret_cast<const T*>(tree.out + static_cast<size_t>(row) * tree.stride) + c;
  };
  int c = from;
  for (; c + kColumns <= to; c += kColumns) {
    typename Isa::F sums[kVectors];
    unrolled<kVectors>([&](auto i) NOMATMUL_INLINE {
      sums[i] = add ? Isa::load(y + c + i * Isa::kWidth) : typename Isa::F{};
    });
    // Prefetched: these rows' next columns, at their end the first ones of the next rows.
    const bool more = c + 2 * kColumns <= to;
    const int32_t* ahead = more ? rows : next;
    const int ahead_c = more ? c + kColumns : from;
    for (int r = 0; r < count; ++r) {
      if (ahead != nullptr) {
        fetch(reinterpret_cast<const uint8_t*>(row_at(ahead[r], ahead_c)), kColumns * sizeof(T));
      }
      const T* w = row_at(rows[r], c);
      const typename Isa::F scale = splat_f<Isa>(coefficient[r]);
      unrolled<kVectors>([&](auto i) NOMATMUL_INLINE {
        sums[i] = sums[i] + scale * Isa::load(w + i * Isa::kWidth);
      });
    }
    unrolled<kVectors>([&](auto i) NOMATMUL_INLINE {
      std::memcpy(y + c + i * Isa::kWidth, &sums[i], sizeof sums[i]);
    });
  }
  for (; c < to; c += Isa::kWidth) {  // a vector, or what is left of one
    const int there = at_most(Isa::kWidth, to - c);
    float part[Isa::kWidth] = {};
    if (add) std::memcpy(part, y + c, static_cast<size_t>(there) * sizeof(float));
    typename Isa::F sum = Isa::load(part);
    for (int r = 0; r < count; ++r) {
      T w[Isa::kWidth] = {};
      std::memcpy(w, row_at(rows[r], c), static_cast<size_t>(there) * sizeof(T));
      sum = sum + splat_f<Isa>(coefficient[r]) * Isa::load(w);
    }
    std::memcpy(part, &sum, sizeof part);
    std::memcpy(y + c, part, static_cast<size_t>(there) * sizeof(float));
  }
}

template <class Isa>
void combine_floats(const FffTree& tree, const int32_t* rows, const float* coefficient, int count,
                    float* y, int from, int to, bool add, const int32_t* next) {
  switch (tree.form) {
    case FffForm::kF32:
      return combine_rows<Isa, float>(tree, rows, coefficient, count, y, from, to, add, next);
    case FffForm::kBF16:
      return combine_rows<Isa, uint16_t>(tree, rows, coefficient, count, y, from, to, add, next);
    case FffForm::kInt8:
      return combine_rows<Isa, int8_t>(tree, rows, coefficient, count, y, from, to, add, next);
    case FffForm::kTernary:
      return;  // combine_ternary
  }
}

template <class Isa>
void dots_of(const FffTree& tree, const int32_t* rows, int count, const float* x, float* out) {
  for (int i = 0; i < count; ++i) {
    const uint8_t* in = tree.in + static_cast<size_t>(rows[i]) * tree.stride;
    if (i + 1 < count) {
      fetch(tree.in + static_cast<size_t>(rows[i + 1]) * tree.stride, tree.side_bytes);
    }
    out[i] = dot_float<Isa>(reinterpret_cast<const float*>(in), x, tree.k);
  }
}

template <class Isa>
size_t fff_prepared_bytes(FffForm form, int k) {
  const size_t size = static_cast<size_t>(k), padded = round_up(size, kSumLanes);
  if (form == FffForm::kTernary) return round_up(Isa::ternary_bytes(k), 64);
  if (form == FffForm::kInt8) return padded * sizeof(typename Isa::Q);
  return size == padded ? 0 : padded * sizeof(float);
}

template <class Isa>
void fff_prepare(FffForm form, const void* x, int k, void* prepared) {
  const size_t size = static_cast<size_t>(k), padded = round_up(size, kSumLanes);
  if (form == FffForm::kTernary) {
    Isa::ternary_prepare(static_cast<const int8_t*>(x), k, static_cast<int8_t*>(prepared));
    return;
  }
  if (form == FffForm::kInt8) {
    auto* wide = static_cast<typename Isa::Q*>(prepared);
    const auto* q = static_cast<const int8_t*>(x);
    for (size_t e = 0; e < size; ++e) wide[e] = q[e];
    for (size_t e = size; e < padded; ++e) wide[e] = 0;
    return;
  }
  auto* copy = static_cast<float*>(prepared);
  std::memcpy(copy, x, size * sizeof(float));
  for (size_t e = size; e < padded; ++e) copy[e] = 0.0f;
}

inline float quantise_plain(const float* x, int k, int8_t* q) {
  return quantise(k, q, [=](int e, auto load) { return load(x + e); });
}

template <class Function>
bool activate_with(const float* logits, int count, float* h, Function function) {
  F8 poison = splat(0.0f);
  int i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const F8 v = load8(logits + i);
    poison = poison + v * splat(0.0f);  // 0 * inf and 0 * NaN are NaN
    store8(h + i, function(v));
  }
  if (i < count) {
    const F8 v = load_part(logits + i, count - i);
    poison = poison + v * splat(0.0f);
    store_part(h + i, function(v), count - i);
  }
  const float bad = fold_sum(poison);
  return bad == bad;
}

inline bool activate_all(Activation activation, const float* logits, int count, float* h) {
  switch (activation) {
    case Activation::kGelu:
      return activate_with(logits, count, h, [](F8 v) { return gelu(v); });
    case Activation::kSilu:
      return activate_with(logits, count, h, [](F8 v) { return silu(v); });
    case Activation::kRelu:
      return activate_with(logits, count, h, [](F8 v) { return relu(v); });
    case Activation::kRelu2:
      return activate_with(logits, count, h, [](F8 v) { return relu(v) * relu(v); });
  }
  return false;
}

// Prepared ternary activations in planes (plane.h).
template <int kVec>
struct TernaryPlanes {
  static size_t ternary_bytes(int k) {
    return PlaneLayout(Packing::kTwoBit, kVec, 1, k).bytes_per_token;
  }
  static void ternary_prepare(const int8_t* q, int k, int8_t* prepared) {
    split_row<kVec, 4>(q, k, prepared);
  }
};

// Four logits one after the other, where there is no better way.
template <class Isa>
struct OneByOne {
  using Q = int16_t;
  static void four_int8(const int8_t* const (&rows)[kFour], const int16_t* const (&x)[kFour], int k,
                        int32_t* out) {
    for (int i = 0; i < kFour; ++i) out[i] = Isa::dot_int8(rows[i], x[i], k);
  }
  static void four_ternary(const uint8_t* const (&rows)[kFour], const int8_t* const (&x)[kFour],
                           int k, int32_t* out) {
    for (int i = 0; i < kFour; ++i) out[i] = Isa::dot_ternary(rows[i], x[i], k);
  }
};

// The plain form of what vector units have their own for.
struct PlainIntegers {
  static int32_t dot_int8(const int8_t* row, const int16_t* x, int k) {
    int32_t sum = 0;
    for (int e = 0; e < k; ++e) sum += static_cast<int16_t>(row[e]) * x[e];
    return sum;
  }
  static void combine_ternary(const FffTree& tree, const int32_t* rows, const int8_t* q, int count,
                              float scale, float* y, int from, int to, const int32_t*) {
    const int32_t total = sum_of(q, count);
    for (int c = from; c < to; ++c) {
      int32_t sum = -total;
      for (int r = 0; r < count; ++r) {
        const uint8_t* row = tree.out + static_cast<size_t>(rows[r]) * tree.stride;
        sum += ((row[c / 4] >> (c % 4 * 2)) & 3) * q[r];
      }
      y[c] = static_cast<float>(sum) * scale;
    }
  }
};

// Vectors of floats as the compiler lowers them. No template: GCC 12 checks the arguments of
// __builtin_convertvector before it knows a template's types.
#define NOMATMUL_PLAIN_FLOATS(floats)                                                    \
  static constexpr int kWidth = floats;                                                  \
  using F = float __attribute__((vector_size(floats * 4)));                              \
  using Words = uint32_t __attribute__((vector_size(floats * 4)));                       \
  using Ints = int32_t __attribute__((vector_size(floats * 4)));                         \
  using Halves = uint16_t __attribute__((vector_size(floats * 2)));                      \
  using Bytes = int8_t __attribute__((vector_size(floats)));                             \
  static F load(const float* p) { return load_as<F>(p); }                                \
  static F load(const uint16_t* p) {                                                     \
    const Words words = __builtin_convertvector(load_as<Halves>(p), Words);              \
    return reinterpret_cast<F>(words << 16);                                             \
  }                                                                                      \
  static F load(const int8_t* p) {                                                       \
    return __builtin_convertvector(__builtin_convertvector(load_as<Bytes>(p), Ints), F); \
  }

template <class V>
NOMATMUL_INLINE inline V load_as(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

}  // namespace
}  // namespace nomatmul

#define NOMATMUL_TREES(Isa)                                                        \
  {fff_prepared_bytes<Isa>, fff_prepare<Isa>,     quantise_plain, walk_trees<Isa>, \
   combine_floats<Isa>,     Isa::combine_ternary, activate_all,   dots_of<Isa>}
