#include "fff.h"

#include <algorithm>
#include <atomic>
#include <climits>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

namespace nomatmul {
namespace {

// Walkers that descend together: their cache misses overlap.
constexpr int kWalkers = 16;
// With so few, both children are called into cache before the decision.
constexpr int kFewWalkers = 3;
constexpr int kMaxBlock = 64;
// Bytes that surely stay in a core's own cache while other things pass through it.
constexpr size_t kCacheBytes = 256 * 1024;
// Above so many bytes of one tree, and from so many tokens on, tokens are sorted by their paths.
// Measured at 16,384 tokens, 32 MiB of third-level cache: sorting takes 15 % off a tree of 25 MB,
// nothing off one of 12.5 MB, and costs 10 % at 6 MB and below.
constexpr size_t kGroupBytes = 8 * 1024 * 1024;
constexpr int kGroupTokens = 1024;
// Visits of one batch that are held at a time.
constexpr int64_t kMaxVisits = 4 * 1024 * 1024;
constexpr int kMaxInteger = 131072;  // inputs of int8 and ternary rows: |sum| < 2^31
constexpr int kMaxActive = 131072;  // 127 * 128 * this < 2^31: the largest lane of a ternary output

size_t round64(size_t value) { return (value + 63) / 64 * 64; }

void require(bool good, const std::string& message) {
  if (!good) throw std::invalid_argument(message);
}

// The lowest token whose walk is not finite; -1 if there is none.
class Poison {
 public:
  void report(int64_t token) {
    int64_t seen = first_.load(std::memory_order_relaxed);
    while (token < seen && !first_.compare_exchange_weak(seen, token)) {
    }
  }
  void check() const {
    const int64_t token = first_.load();
    if (token == INT64_MAX) return;
    throw std::domain_error("the logits of token " + std::to_string(token) +
                            " are not finite (NaN or infinity)");
  }

 private:
  std::atomic<int64_t> first_{INT64_MAX};
};

}  // namespace

int64_t fff_rows(int trees, int depth) {
  require(trees >= 1, "trees is " + std::to_string(trees) + ", expected at least 1");
  require(depth >= 0, "depth is " + std::to_string(depth) + ", expected at least 0");
  const int64_t nodes = depth < 31 ? (int64_t{1} << (depth + 1)) - 1 : INT64_MAX;
  require(nodes <= INT_MAX / 2 / trees, std::to_string(trees) + " trees of depth " +
                                            std::to_string(depth) + " have more rows than " +
                                            std::to_string(INT_MAX / 2));
  return nodes * trees;
}

// One call: tokens first .. first + tokens - 1 of what the caller gave.
struct FffLayer::Batch {
  const float* x;
  int tokens;
  float* y;
  int32_t* rows;
  float* logits;
  ThreadPool& pool;
  FffWork& work;
  Poison& poison;
  int64_t first;
};

// Some tokens of a batch, in the order in which they are to be taken. index == nullptr: those from
// `begin` on. prepared, steps, sums, rows and logits are those of the token `origin` and after.
struct FffLayer::Piece {
  int begin, count;
  const int32_t* index;
  int origin;
  const uint8_t* prepared;
  const float* steps;
  const int32_t* sums;
  int32_t* rows;
  float* logits;

  int token(int i) const { return index == nullptr ? begin + i : index[i]; }
};

FffLayer::FffLayer(const FffSpec& spec, const Kernels& kernels, const FffKernels& fff)
    : spec_(spec), tree_{}, kernels_(&kernels), fff_(&fff), levels_(spec.depth + 1) {
  row_count_ = fff_rows(spec.trees, spec.depth);
  nodes_ = static_cast<int32_t>(row_count_ / spec.trees);
  const bool integers = spec.form == FffForm::kInt8 || spec.form == FffForm::kTernary;
  const int limit = integers ? kMaxInteger : kMaxElements;
  require(spec.hidden >= 1 && spec.hidden <= limit,
          "hidden is " + std::to_string(spec.hidden) + ", expected 1 to " + std::to_string(limit));
  require(active() <= kMaxActive, "a token visits " + std::to_string(active()) +
                                      " rows, expected at most " + std::to_string(kMaxActive));
  require(spec.rows != nullptr, "rows are missing");
  require(!integers || spec.scales != nullptr, "int8 and ternary rows need scales");
  const bool ternary = spec.form == FffForm::kTernary;
  require(!ternary || (spec.norm_in != nullptr && spec.norm_out != nullptr),
          "ternary rows need norm_in and norm_out");
  require(!ternary || spec.bias == nullptr, "ternary rows have no bias");
  const size_t k = spec.hidden;
  tree_.form = spec.form;
  tree_.k = spec.hidden;
  tree_.side_bytes = spec.form == FffForm::kF32    ? 4 * k
                     : spec.form == FffForm::kBF16 ? 2 * k
                     : spec.form == FffForm::kInt8 ? k
                                                   : row_bytes_of(Packing::kTwoBit, spec.hidden);
  tree_.stride = 2 * tree_.side_bytes;
  tree_.in = static_cast<const uint8_t*>(spec.rows);
  tree_.out = tree_.in + tree_.side_bytes;
  tree_.row_scale = spec.form == FffForm::kInt8 ? spec.scales : nullptr;
  tree_.scale_in = ternary ? spec.scales[0] : 0.0f;
  tree_.bias = spec.bias;
  prepared_bytes_ = round64(fff_->prepared_bytes(spec.form, spec.hidden));
  as_is_ = !integers && spec.hidden % 64 == 0;
}

FffLayer FffLayer::apart(const FffSpec& spec, const float* w_in, const Kernels& kernels,
                         const FffKernels& fff) {
  FffSpec whole = spec;
  whole.form = FffForm::kF32;
  whole.rows = w_in;
  FffLayer layer(whole, kernels, fff);
  layer.tree_.out = layer.tree_.in;
  layer.tree_.stride = layer.tree_.side_bytes;
  return layer;
}

void FffLayer::forward(const float* x, int tokens, float* y, int32_t* rows, float* logits,
                       ThreadPool& pool, FffWork& work) const {
  const int most = static_cast<int>(std::max<int64_t>(kMaxBlock, kMaxVisits / active()));
  Poison poison;
  for (int first = 0; first < tokens; first += most) {
    const size_t at = first, visits = at * active();
    const int count = std::min(most, tokens - first);
    Batch batch{x + at * spec_.hidden,
                count,
                y == nullptr ? nullptr : y + at * spec_.hidden,
                rows == nullptr ? nullptr : rows + visits,
                logits == nullptr ? nullptr : logits + visits,
                pool,
                work,
                poison,
                first};
    run(batch);
    poison.check();
  }
}

void FffLayer::run(Batch& batch) const {
  const int threads = batch.pool.alone() ? 1 : batch.pool.size();
  const size_t visited = tree_.side_bytes * active() * batch.tokens;
  const int split = split_level(batch.tokens);
  if (split > 0) return run_groups(batch, split);
  if (threads > 1 && batch.tokens < 4 * threads && spec_.trees >= 4 * threads &&
      visited >= kCacheBytes / 2) {
    return run_trees(batch);
  }
  return run_blocks(batch);
}

size_t FffLayer::ready_bytes() const {
  return round64(spec_.hidden * sizeof(float)) + round64(spec_.hidden);
}

// The level at which a batch is cut into subtrees that fit into a cache; 0: it is not.
int FffLayer::split_level(int tokens) const {
  if (tokens < kGroupTokens || nodes_ * tree_.stride < kGroupBytes) return 0;
  int split = 1;
  while (split < levels_ - 1 &&
         ((size_t{1} << (levels_ - split)) - 1) * tree_.stride > kCacheBytes) {
    ++split;
  }
  return split;
}

// Quantises or pads one token; false where it is not finite. q: ready_bytes() of scratch.
bool FffLayer::ready(const float* x, uint8_t* prepared, float* step, int32_t* sum,
                     int8_t* q) const {
  if (as_is_) return true;
  const int k = spec_.hidden;
  if (spec_.form == FffForm::kF32 || spec_.form == FffForm::kBF16) {
    fff_->prepare(spec_.form, x, k, prepared);
    return true;
  }
  if (spec_.form == FffForm::kTernary) {  // what rms_norm_quantize gives, with half the divisions
    auto* normed = reinterpret_cast<float*>(q + round64(static_cast<size_t>(k)));
    kernels_->rms_norm(x, spec_.norm_in, spec_.eps, k, normed);
    x = normed;
  }
  *step = fff_->quantise(x, k, q);
  const bool good = std::isfinite(*step);
  if (!good) std::memset(q, 0, static_cast<size_t>(k));
  int32_t total = 0;
  for (int e = 0; e < k; ++e) total += q[e];
  *sum = total;
  fff_->prepare(spec_.form, q, k, prepared);
  return good;
}

void FffLayer::call_in(const Batch& batch, const Piece& piece, int i) const {
  const size_t token = piece.token(i);
  const auto* at = reinterpret_cast<const uint8_t*>(batch.x + token * spec_.hidden);
  size_t bytes = spec_.hidden * sizeof(float);
  if (!as_is_) {
    at = piece.prepared + (token - piece.origin) * prepared_bytes_;
    bytes = prepared_bytes_;
  }
  for (size_t line = 0; line < bytes; line += 64) __builtin_prefetch(at + line);
}

// Moves the piece's tokens through levels from .. to - 1 of some trees.
void FffLayer::walk(const Batch& batch, const Piece& piece, int tree, int trees, int from,
                    int to) const {
  const int wide = std::min(piece.count, kWalkers);   // tokens that descend together
  const int deep = std::min(trees, kWalkers / wide);  // and trees of each
  const bool near = tree_.side_bytes * active() * piece.count <= kCacheBytes / 2;
  FffWalker walkers[kWalkers];
  for (int t = 0; t < trees; t += deep) {
    for (int i = 0; i < piece.count; i += wide) {
      if (piece.index != nullptr) {  // tokens lie anywhere: the next ones are called into cache
        for (int j = i + wide; j < std::min(i + 2 * wide, piece.count); ++j)
          call_in(batch, piece, j);
      }
      int count = 0;
      for (int u = t; u < std::min(t + deep, trees); ++u) {
        for (int j = i; j < std::min(i + wide, piece.count); ++j, ++count) {
          const int token = piece.token(j);
          const size_t at = token - piece.origin;
          const size_t visit = at * active() + static_cast<size_t>(tree + u) * levels_;
          const void* x =
              as_is_ ? static_cast<const void*>(batch.x + static_cast<size_t>(token) * spec_.hidden)
                     : piece.prepared + at * prepared_bytes_;
          const int32_t base = (tree + u) * nodes_;
          FffWalker& walker = walkers[count];
          walker = {x, 0.0f, 0, base, 0, piece.logits + visit, piece.rows + visit};
          if (piece.steps != nullptr) {
            walker.step = piece.steps[at];
            walker.sum = piece.sums[at];
          }
          if (from > 0) {  // goes on from where the visit before led
            const int32_t node = walker.rows[from - 1] - base;
            walker.node = 2 * node + 1 + (walker.logits[from - 1] > 0.0f ? 1 : 0);
          }
        }
      }
      const FffFetch fetch{batch.y != nullptr && near, count <= kFewWalkers};
      fff_->walk(tree_, walkers, count, from, to, fetch);
    }
  }
}

// h = act(logits) of some trees, token by token: [count, trees * levels].
bool FffLayer::activate(const Batch& batch, const Piece& piece, int tree, int trees,
                        float* h) const {
  const int visits = trees * levels_;
  bool good = true;
  for (int i = 0; i < piece.count; ++i) {
    const size_t at = static_cast<size_t>(piece.token(i) - piece.origin) * active() +
                      static_cast<size_t>(tree) * levels_;
    float* to = h + static_cast<size_t>(i) * visits;
    if (!fff_->activate(spec_.activation, piece.logits + at, visits, to)) {
      batch.poison.report(batch.first + piece.token(i));
      good = false;
    }
    if (spec_.form == FffForm::kInt8) {
      for (int v = 0; v < visits; ++v) {
        to[v] *= spec_.scales[2 * static_cast<size_t>(piece.rows[at + v]) + 1];
      }
    }
  }
  return good;
}

// y += the visited rows of some trees; the first tree starts y. h as activate() left it.
void FffLayer::combine(const Batch& batch, const Piece& piece, int tree, int trees,
                       float* h) const {
  // Few trees at a time, so that their rows stay in cache from token to token.
  const size_t tree_bytes = nodes_ * tree_.side_bytes;
  const int fit = static_cast<int>(std::max<size_t>(1, kCacheBytes / 2 / tree_bytes));
  const int step = std::min(trees, std::max(fit, (kWalkers + levels_ - 1) / levels_));
  for (int t = 0; t < trees; t += step) {
    const int some = std::min(step, trees - t), visits = some * levels_;
    for (int i = 0; i < piece.count; ++i) {
      const int token = piece.token(i);
      const auto rows_of = [&](int of, int from_tree) {
        return piece.rows + static_cast<size_t>(piece.token(of) - piece.origin) * active() +
               static_cast<size_t>(tree + from_tree) * levels_;
      };
      const int32_t* next = nullptr;
      if (i + 1 < piece.count) {
        next = rows_of(i + 1, t);
      } else if (t + 2 * step <= trees) {
        next = rows_of(0, t + step);
      }
      fff_->combine(tree_, rows_of(i, t), h + (static_cast<size_t>(i) * trees + t) * levels_,
                    visits, batch.y + static_cast<size_t>(token) * spec_.hidden, 0, spec_.hidden,
                    tree + t > 0, next);
    }
  }
}

// The second quantiser, and the outputs, of all trees.
void FffLayer::combine_ternary(const Batch& batch, const Piece& piece, float* h) const {
  const int visits = active();
  float* weights = h + static_cast<size_t>(piece.count) * visits;
  auto* q = reinterpret_cast<int8_t*>(weights + visits);
  for (int i = 0; i < piece.count; ++i) {
    const int token = piece.token(i);
    const auto rows_of = [&](int of) {
      return piece.rows + static_cast<size_t>(piece.token(of) - piece.origin) * visits;
    };
    const int32_t* rows = rows_of(i);
    if (i + 1 < piece.count) {
      const int32_t* next = rows_of(i + 1);
      for (int v = 0; v < visits; ++v) {
        const uint8_t* out = tree_.out + static_cast<size_t>(next[v]) * tree_.stride;
        for (size_t at = 0; at < tree_.side_bytes; at += 64) __builtin_prefetch(out + at);
      }
    }
    for (int v = 0; v < visits; ++v) weights[v] = spec_.norm_out[rows[v]];
    const float* values = h + static_cast<size_t>(i) * visits;
    const float step = kernels_->rms_norm_quantize(values, weights, spec_.eps, visits, q);
    if (!std::isfinite(step)) {
      batch.poison.report(batch.first + token);
      continue;
    }
    fff_->combine_ternary(tree_, rows, q, visits, spec_.scales[1] * step,
                          batch.y + static_cast<size_t>(token) * spec_.hidden, 0, spec_.hidden);
  }
}

void FffLayer::run_blocks(Batch& batch) const {
  const int threads = batch.pool.size(), tokens = batch.tokens;
  // Many trees fill the walkers with few tokens, so that a small batch serves every thread.
  const int least = threads == 1 ? kWalkers : std::max(1, kWalkers / spec_.trees);
  int block = (tokens / (4 * threads) + least - 1) / least * least;
  block = std::clamp(block, least, kMaxBlock);
  block = std::min(block, tokens);
  const size_t visits = static_cast<size_t>(block) * active(), k = spec_.hidden;
  // Each thread's buffers, one after the other.
  const size_t h_bytes = round64((visits + active()) * sizeof(float) + active());
  const size_t visit_bytes = round64(visits * sizeof(float)), token_bytes = round64(block * 4u);
  const size_t prepared = as_is_ ? 0 : prepared_bytes_ * block;
  const size_t all = h_bytes + 2 * visit_bytes + 2 * token_bytes + prepared + ready_bytes();
  uint8_t* buffers = batch.work.threads.need<uint8_t>(all * threads);
  batch.pool.run((tokens + block - 1) / block, [&](int task, int thread) {
    uint8_t* at = buffers + all * thread;
    const auto take = [&at](size_t bytes) {
      uint8_t* taken = at;
      at += bytes;
      return taken;
    };
    auto* h = reinterpret_cast<float*>(take(h_bytes));
    auto* logits = reinterpret_cast<float*>(take(visit_bytes));
    auto* rows = reinterpret_cast<int32_t*>(take(visit_bytes));
    auto* steps = reinterpret_cast<float*>(take(token_bytes));
    auto* sums = reinterpret_cast<int32_t*>(take(token_bytes));
    uint8_t* ready_tokens = take(prepared);
    auto* q = reinterpret_cast<int8_t*>(take(ready_bytes()));
    const int first = task * block, count = std::min(block, tokens - first);
    const size_t from = static_cast<size_t>(first) * active();
    if (batch.logits != nullptr) logits = batch.logits + from;
    if (batch.rows != nullptr) rows = batch.rows + from;
    for (int i = 0; i < count; ++i) {
      if (!ready(batch.x + (first + i) * k, ready_tokens + prepared_bytes_ * i, steps + i, sums + i,
                 q)) {
        batch.poison.report(batch.first + first + i);
      }
    }
    const Piece piece{first, count, nullptr, first, ready_tokens, steps, sums, rows, logits};
    walk(batch, piece, 0, spec_.trees, 0, levels_);
    if (!activate(batch, piece, 0, spec_.trees, h) || batch.y == nullptr) return;
    if (spec_.form == FffForm::kTernary) return combine_ternary(batch, piece, h);
    combine(batch, piece, 0, spec_.trees, h);
  });
}

void FffLayer::run_trees(Batch& batch) const {
  const int threads = batch.pool.size(), tokens = batch.tokens;
  const size_t visits = static_cast<size_t>(tokens) * active(), k = spec_.hidden;
  FffWork& work = batch.work;
  uint8_t* prepared = as_is_ ? nullptr : work.prepared.need<uint8_t>(prepared_bytes_ * tokens);
  float* steps = work.steps.need<float>(tokens);
  int32_t* sums = work.sums.need<int32_t>(tokens);
  float* logits = batch.logits != nullptr ? batch.logits : work.logits.need<float>(visits);
  int32_t* rows = batch.rows != nullptr ? batch.rows : work.rows.need<int32_t>(visits);
  const size_t h_bytes = round64((visits + active()) * sizeof(float) + active());
  uint8_t* buffer = work.threads.need<uint8_t>(h_bytes + ready_bytes());
  auto* h = reinterpret_cast<float*>(buffer);
  auto* q = reinterpret_cast<int8_t*>(buffer + h_bytes);
  for (int i = 0; i < tokens; ++i) {
    if (!ready(batch.x + i * k, prepared + prepared_bytes_ * i, steps + i, sums + i, q)) {
      batch.poison.report(batch.first + i);
    }
  }
  const Piece piece{0, tokens, nullptr, 0, prepared, steps, sums, rows, logits};
  const int share = std::max(1, std::min(kWalkers, spec_.trees / (4 * threads)));
  batch.pool.run((spec_.trees + share - 1) / share, [&](int task, int) {
    const int tree = task * share;
    walk(batch, piece, tree, std::min(share, spec_.trees - tree), 0, levels_);
  });
  if (!activate(batch, piece, 0, spec_.trees, h) || batch.y == nullptr) return;
  if (spec_.form == FffForm::kTernary) return combine_ternary(batch, piece, h);
  const int columns = std::max(128, static_cast<int>(k / (2 * threads) + 127) / 128 * 128);
  const int slices = (spec_.hidden + columns - 1) / columns;
  batch.pool.run(slices * tokens, [&](int task, int) {
    const int token = task / slices, from = task % slices * columns;
    const size_t at = static_cast<size_t>(token) * active();
    fff_->combine(tree_, rows + at, h + at, active(), batch.y + token * k, from,
                  std::min(from + columns, spec_.hidden), false, nullptr);
  });
}

void FffLayer::run_groups(Batch& batch, int split) const {
  const int tokens = batch.tokens;
  const size_t visits = static_cast<size_t>(tokens) * active(), k = spec_.hidden;
  FffWork& work = batch.work;
  uint8_t* prepared = as_is_ ? nullptr : work.prepared.need<uint8_t>(prepared_bytes_ * tokens);
  float* steps = work.steps.need<float>(tokens);
  int32_t* sums = work.sums.need<int32_t>(tokens);
  float* logits = batch.logits != nullptr ? batch.logits : work.logits.need<float>(visits);
  int32_t* rows = batch.rows != nullptr ? batch.rows : work.rows.need<int32_t>(visits);
  int32_t* order = work.order.need<int32_t>(tokens);
  const int groups = 1 << split, tasks = (tokens + kMaxBlock - 1) / kMaxBlock;
  int32_t* next = work.keys.need<int32_t>(groups + 1);
  const size_t h_size = round64(static_cast<size_t>(kMaxBlock + 2) * active() * sizeof(float));
  const size_t buffer = std::max(h_size, ready_bytes());
  uint8_t* buffers = work.threads.need<uint8_t>(buffer * batch.pool.size());
  const bool ternary = spec_.form == FffForm::kTernary;
  const Piece all{0, tokens, nullptr, 0, prepared, steps, sums, rows, logits};
  const auto part_of = [&](int task, const int32_t* index) {
    Piece part = all;
    part.begin = task * kMaxBlock;
    part.count = std::min(kMaxBlock, tokens - part.begin);
    part.index = index == nullptr ? nullptr : index + part.begin;
    return part;
  };
  for (int tree = 0; tree < spec_.trees; ++tree) {
    batch.pool.run(tasks, [&](int task, int thread) {
      const Piece part = part_of(task, nullptr);
      auto* q = reinterpret_cast<int8_t*>(buffers + buffer * thread);
      for (int i = part.begin; tree == 0 && i < part.begin + part.count; ++i) {
        if (!ready(batch.x + i * k, prepared + prepared_bytes_ * i, steps + i, sums + i, q)) {
          batch.poison.report(batch.first + i);
        }
      }
      walk(batch, part, tree, 1, 0, split);
    });
    // A counting sort by the node on level `split`.
    std::fill(next, next + groups + 1, 0);
    const auto key_of = [&](int token) {
      const size_t at =
          static_cast<size_t>(token) * active() + static_cast<size_t>(tree) * levels_ + split - 1;
      const int32_t above = rows[at] - tree * nodes_ - (groups / 2 - 1);  // its place on its level
      return 2 * above + (logits[at] > 0.0f ? 1 : 0);
    };
    for (int i = 0; i < tokens; ++i) ++next[key_of(i) + 1];
    for (int g = 1; g <= groups; ++g) next[g] += next[g - 1];
    for (int i = 0; i < tokens; ++i) order[next[key_of(i)]++] = i;
    batch.pool.run(tasks, [&](int task, int thread) {
      const Piece part = part_of(task, order);
      auto* h = reinterpret_cast<float*>(buffers + buffer * thread);
      walk(batch, part, tree, 1, split, levels_);
      if (ternary && spec_.trees > 1) return;
      if (!activate(batch, part, tree, 1, h) || batch.y == nullptr) return;
      if (ternary) return combine_ternary(batch, part, h);
      combine(batch, part, tree, 1, h);
    });
  }
  if (!ternary || spec_.trees == 1) return;
  batch.pool.run(tasks, [&](int task, int thread) {
    const Piece part = part_of(task, nullptr);
    auto* h = reinterpret_cast<float*>(buffers + buffer * thread);
    if (!activate(batch, part, 0, spec_.trees, h) || batch.y == nullptr) return;
    combine_ternary(batch, part, h);
  });
}

}  // namespace nomatmul
