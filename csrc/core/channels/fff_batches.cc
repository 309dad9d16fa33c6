// How a batch is cut into tasks: blocks of tokens, trees, or groups of tokens by path (fff.h).
#include <algorithm>
#include <cstring>

#include "core/channels/fff_parts.h"

namespace nomatmul {
namespace {

constexpr int kMaxBlock = 64;
// Above so many bytes of one tree, and from so many tokens on, tokens are sorted by their paths.
// Measured at 16,384 tokens, 32 MiB of third-level cache: sorting takes 15 % off a tree of 25 MB,
// nothing off one of 12.5 MB, and costs 10 % at 6 MB and below.
constexpr size_t kGroupBytes = 8 * 1024 * 1024;
constexpr int kGroupTokens = 1024;

}  // namespace

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

void FffLayer::run_blocks(Batch& batch) const {
  const int threads = batch.pool.size(), tokens = batch.tokens;
  // Many trees fill the walkers with few tokens, so that a small batch serves every thread.
  const int least = threads == 1 ? kWalkers : std::max(1, kWalkers / spec_.trees);
  int block = (tokens / (threads == 1 ? 2 : 4 * threads) + least - 1) / least * least;
  block = std::clamp(block, least, kMaxBlock);
  block = std::min(block, tokens);
  const size_t visits = static_cast<size_t>(block) * active();
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
    const Piece piece{first, count, nullptr, first, ready_tokens, steps, sums, rows, logits};
    ready(batch, piece, q);
    walk(batch, piece, 0, spec_.trees, 0, levels_);
    finish(batch, piece, 0, spec_.trees, h);
  });
}

// All tokens of a batch, in buffers that the threads share.
FffLayer::Piece FffLayer::whole(Batch& batch) const {
  const size_t tokens = batch.tokens, visits = tokens * active();
  FffWork& work = batch.work;
  return {0,
          batch.tokens,
          nullptr,
          0,
          as_is_ ? nullptr : work.prepared.need<uint8_t>(prepared_bytes_ * tokens),
          work.steps.need<float>(tokens),
          work.sums.need<int32_t>(tokens),
          batch.rows != nullptr ? batch.rows : work.rows.need<int32_t>(visits),
          batch.logits != nullptr ? batch.logits : work.logits.need<float>(visits)};
}

void FffLayer::run_trees(Batch& batch) const {
  const int threads = batch.pool.size(), tokens = batch.tokens;
  const size_t visits = static_cast<size_t>(tokens) * active(), k = spec_.hidden;
  const Piece piece = whole(batch);
  const size_t h_bytes = round64((visits + active()) * sizeof(float) + active());
  uint8_t* buffer = batch.work.threads.need<uint8_t>(h_bytes + ready_bytes());
  auto* h = reinterpret_cast<float*>(buffer);
  ready(batch, piece, reinterpret_cast<int8_t*>(buffer + h_bytes));
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
    fff_->combine(tree_, piece.rows + at, h + at, active(), batch.y + token * k, from,
                  std::min(from + columns, spec_.hidden), false, nullptr);
  });
}

void FffLayer::run_groups(Batch& batch, int split) const {
  const int tokens = batch.tokens;
  const Piece all = whole(batch);
  int32_t* order = batch.work.order.need<int32_t>(tokens);
  const int groups = 1 << split, tasks = (tokens + kMaxBlock - 1) / kMaxBlock;
  int32_t* next = batch.work.keys.need<int32_t>(groups + 1);
  const size_t h_size = round64(static_cast<size_t>(kMaxBlock + 2) * active() * sizeof(float));
  const size_t buffer = std::max(h_size, ready_bytes());
  uint8_t* buffers = batch.work.threads.need<uint8_t>(buffer * batch.pool.size());
  // The second quantiser needs a token's visits of all trees.
  const bool late = spec_.form == FffForm::kTernary && spec_.trees > 1;
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
      if (tree == 0) ready(batch, part, reinterpret_cast<int8_t*>(buffers + buffer * thread));
      walk(batch, part, tree, 1, 0, split);
    });
    // A counting sort by the node on level `split`.
    std::fill(next, next + groups + 1, 0);
    const auto key_of = [&](int token) {
      const size_t at =
          static_cast<size_t>(token) * active() + static_cast<size_t>(tree) * levels_ + split - 1;
      const int32_t above =
          all.rows[at] - tree * nodes_ - (groups / 2 - 1);  // its place on its level
      return 2 * above + (all.logits[at] > 0.0f ? 1 : 0);
    };
    for (int i = 0; i < tokens; ++i) ++next[key_of(i) + 1];
    for (int g = 1; g <= groups; ++g) next[g] += next[g - 1];
    for (int i = 0; i < tokens; ++i) order[next[key_of(i)]++] = i;
    batch.pool.run(tasks, [&](int task, int thread) {
      const Piece part = part_of(task, order);
      auto* h = reinterpret_cast<float*>(buffers + buffer * thread);
      walk(batch, part, tree, 1, split, levels_);
      if (!late) finish(batch, part, tree, 1, h);
    });
  }
  if (!late) return;
  batch.pool.run(tasks, [&](int task, int thread) {
    finish(batch, part_of(task, nullptr), 0, spec_.trees,
           reinterpret_cast<float*>(buffers + buffer * thread));
  });
}

}  // namespace nomatmul
