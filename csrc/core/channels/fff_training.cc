// The gradients of a conditional layer: gathers, and segment sums over visits sorted by row.
#include <algorithm>
#include <vector>

#include "core/channels/fff.h"

namespace nomatmul {
namespace {

constexpr int kTokensPerTask = 32;
// Columns of a segment sum that a task takes: the tokens' values of those columns stay in cache
// while row after row is summed.
constexpr int kColumnsPerTask = 128;
// How many visits ahead values are prefetched.
constexpr int kAhead = 8;

FffTree float_rows(const float* w, int columns) {
  FffTree tree{};
  tree.form = FffForm::kF32;
  tree.k = columns;
  tree.in = tree.out = reinterpret_cast<const uint8_t*>(w);
  tree.stride = tree.side_bytes = static_cast<size_t>(columns) * sizeof(float);
  return tree;
}

template <class F>
void for_token_blocks(int tokens, ThreadPool& pool, F&& block) {
  pool.run((tokens + kTokensPerTask - 1) / kTokensPerTask, [&](int task, int thread) {
    const int first = task * kTokensPerTask;
    block(first, std::min(first + kTokensPerTask, tokens), thread);
  });
}

// Visits sorted by row: those of row v are start[v] .. start[v + 1] - 1, token by token.
struct Visits {
  std::vector<size_t> start;
  std::vector<int32_t> token;
  std::vector<float> value;

  Visits(const float* h, const int32_t* rows, int tokens, int active, int count)
      : start(static_cast<size_t>(count) + 1) {
    const size_t total = static_cast<size_t>(tokens) * active;
    for (size_t i = 0; i < total; ++i) ++start[rows[i] + size_t{1}];
    for (size_t v = 1; v < start.size(); ++v) start[v] += start[v - 1];
    std::vector<size_t> next(start.begin(), start.end() - 1);
    token.resize(total + kAhead);  // what is prefetched at the very end: token 0
    value.resize(total);
    for (size_t i = 0; i < total; ++i) {
      const size_t at = next[rows[i]]++;
      token[at] = static_cast<int32_t>(i / active);
      value[at] = h[i];
    }
  }
};

}  // namespace

void fff_combine(const float* h, const int32_t* rows, int tokens, int active, const float* w,
                 int columns, float* y, const TreeKernels& fff, ThreadPool& pool) {
  const FffTree tree = float_rows(w, columns);
  for_token_blocks(tokens, pool, [&](int first, int last, int) {
    for (int t = first; t < last; ++t) {
      const size_t at = static_cast<size_t>(t) * active;
      const int32_t* next = t + 1 < last ? rows + at + active : nullptr;
      fff.combine(tree, rows + at, h + at, active, y + static_cast<size_t>(t) * columns, 0, columns,
                  false, next);
    }
  });
}

void fff_gather_dot(const float* g, const int32_t* rows, int tokens, int active, const float* w,
                    int columns, float* out, const TreeKernels& fff, ThreadPool& pool) {
  const FffTree tree = float_rows(w, columns);
  const size_t bytes = fff.prepared_bytes(FffForm::kF32, columns);
  const Block buffers(bytes * pool.size());  // here: a task must not throw
  for_token_blocks(tokens, pool, [&](int first, int last, int thread) {
    auto* padded = reinterpret_cast<float*>(buffers.as<uint8_t>() + bytes * thread);
    for (int t = first; t < last; ++t) {
      const size_t at = static_cast<size_t>(t) * active;
      const float* g_t = g + static_cast<size_t>(t) * columns;
      if (bytes > 0) fff.prepare(FffForm::kF32, g_t, columns, padded);
      fff.dots(tree, rows + at, active, bytes > 0 ? padded : g_t, out + at);
    }
  });
}

void fff_segment_sum(const float* h, const int32_t* rows, int tokens, int active, const float* a,
                     int columns, int count, float* out, float* sums, const TreeKernels& fff,
                     ThreadPool& pool) {
  if (count == 0) return;
  const Visits visits(h, rows, tokens, active, count);
  const FffTree tree = float_rows(a, columns);
  const int slices = (columns + kColumnsPerTask - 1) / kColumnsPerTask;
  // Ranges of rows with about as many visits and rows each; neighbours in a task share a slice.
  const int ranges = std::min(count, 8 * pool.size());
  const size_t weight = (visits.value.size() + static_cast<size_t>(count)) / ranges + 1;
  std::vector<int> bounds{0};
  for (int v = 0; v < count; ++v) {
    if (visits.start[v + 1] + v + 1 >= weight * bounds.size()) bounds.push_back(v + 1);
  }
  if (bounds.back() != count) bounds.push_back(count);
  const int parts = static_cast<int>(bounds.size()) - 1;
  pool.run(slices * parts, [&](int task, int) {
    const int from = task / parts * kColumnsPerTask, part = task % parts;
    const int to = std::min(from + kColumnsPerTask, columns);
    for (int v = bounds[part]; v < bounds[part + 1]; ++v) {
      const size_t at = visits.start[v];
      const int size = static_cast<int>(visits.start[v + 1] - at);
      fff.combine(tree, visits.token.data() + at, visits.value.data() + at, size,
                  out + static_cast<size_t>(v) * columns, from, to, false,
                  visits.token.data() + at + kAhead);
      if (from == 0 && sums != nullptr) {
        float sum = 0.0f;
        for (int i = 0; i < size; ++i) sum += visits.value[at + i];
        sums[v] = sum;
      }
    }
  });
}

}  // namespace nomatmul
