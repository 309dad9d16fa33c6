#include "core/channels/fff.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/channels/fff_parts.h"

namespace nomatmul {
namespace {

// With so few walkers, both children are prefetched before the decision.
constexpr int kFewWalkers = 3;
// Visits of one batch that are held at a time.
constexpr int64_t kMaxVisits = 4 * 1024 * 1024;
constexpr int kMaxInteger = 131072;  // inputs of int8 and ternary rows: |sum| < 2^31
constexpr int kMaxActive = 131072;  // 127 * 128 * this < 2^31: the largest lane of a ternary output

// message: makes the text, for a layer is made anew at every step and nearly always good.
template <typename Message>
void require(bool good, const Message& message) {
  if (!good) throw std::invalid_argument(message());
}

}  // namespace

int64_t fff_rows(int trees, int depth) {
  require(trees >= 1,
          [&] { return "trees is " + std::to_string(trees) + ", expected at least 1"; });
  require(depth >= 0,
          [&] { return "depth is " + std::to_string(depth) + ", expected at least 0"; });
  const int64_t nodes = depth < 31 ? (int64_t{1} << (depth + 1)) - 1 : INT64_MAX;
  require(nodes <= INT_MAX / 2 / trees, [&] {
    return std::to_string(trees) + " trees of depth " + std::to_string(depth) +
           " have more rows than " + std::to_string(INT_MAX / 2);
  });
  return nodes * trees;
}

FffLayer::FffLayer(const FffSpec& spec, const Isa& isa)
    : spec_(spec), tree_{}, kernels_(isa.ternary), fff_(isa.trees), levels_(spec.depth + 1) {
  nodes_ = static_cast<int32_t>(fff_rows(spec.trees, spec.depth) / spec.trees);
  const bool integers = spec.form == FffForm::kInt8 || spec.form == FffForm::kTernary;
  const int limit = integers ? kMaxInteger : kMaxElements;
  require(spec.hidden >= 1 && spec.hidden <= limit, [&] {
    return "hidden is " + std::to_string(spec.hidden) + ", expected 1 to " + std::to_string(limit);
  });
  require(active() <= kMaxActive, [&] {
    return "a token visits " + std::to_string(active()) + " rows, expected at most " +
           std::to_string(kMaxActive);
  });
  require(spec.rows != nullptr, [] { return "rows are missing"; });
  require(!integers || spec.scales != nullptr, [] { return "int8 and ternary rows need scales"; });
  const bool ternary = spec.form == FffForm::kTernary;
  require(!ternary || (spec.norm_in != nullptr && spec.norm_out != nullptr),
          [] { return "ternary rows need norm_in and norm_out"; });
  require(!ternary || spec.bias == nullptr, [] { return "ternary rows have no bias"; });
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
  as_is_ = prepared_bytes_ == 0;
}

FffLayer FffLayer::apart(const FffSpec& spec, const float* w_in, const Isa& isa) {
  FffSpec whole = spec;
  whole.form = FffForm::kF32;
  whole.rows = w_in;
  FffLayer layer(whole, isa);
  layer.tree_.out = layer.tree_.in;
  layer.tree_.stride = layer.tree_.side_bytes;
  return layer;
}

void FffLayer::forward(const float* x, int tokens, float* y, int32_t* rows, float* logits,
                       ThreadPool& pool, FffWork& work) const {
  const int most = static_cast<int>(std::max<int64_t>(kWalkers, kMaxVisits / active()));
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

size_t FffLayer::ready_bytes() const {
  return round64(spec_.hidden * sizeof(float)) + round64(spec_.hidden);
}

// Makes a piece's tokens, in their own order, what the kernels take. q: ready_bytes() of scratch.
void FffLayer::ready(const Batch& batch, const Piece& piece, int8_t* q) const {
  for (int i = piece.begin; !as_is_ && i < piece.begin + piece.count; ++i) {
    const size_t at = i - piece.origin;
    if (!quantise(batch.x + static_cast<size_t>(i) * spec_.hidden,
                  piece.prepared + prepared_bytes_ * at, piece.steps + at, piece.sums + at, q)) {
      batch.poison.report(batch.first + i);
    }
  }
}

// Quantises or pads one token; false where it is not finite.
bool FffLayer::quantise(const float* x, uint8_t* prepared, float* step, int32_t* sum,
                        int8_t* q) const {
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

void FffLayer::prefetch_token(const Batch& batch, const Piece& piece, int i) const {
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
      if (piece.index != nullptr) {  // tokens lie anywhere: the next ones are prefetched
        for (int j = i + wide; j < std::min(i + 2 * wide, piece.count); ++j)
          prefetch_token(batch, piece, j);
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

// What follows the walk of some trees; of ternary rows: of all trees.
void FffLayer::finish(const Batch& batch, const Piece& piece, int tree, int trees, float* h) const {
  if (!activate(batch, piece, tree, trees, h) || batch.y == nullptr) return;
  if (spec_.form == FffForm::kTernary) return combine_ternary(batch, piece, h);
  combine(batch, piece, tree, trees, h);
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
    const int32_t* next = i + 1 < piece.count ? rows_of(i + 1) : nullptr;
    for (int v = 0; v < visits; ++v) weights[v] = spec_.norm_out[rows[v]];
    const float* values = h + static_cast<size_t>(i) * visits;
    const float step = kernels_->rms_norm_quantize(values, weights, spec_.eps, visits, q);
    if (!std::isfinite(step)) {
      batch.poison.report(batch.first + token);
      continue;
    }
    fff_->combine_ternary(tree_, rows, q, visits, spec_.scales[1] * step,
                          batch.y + static_cast<size_t>(token) * spec_.hidden, 0, spec_.hidden,
                          next);
  }
}

}  // namespace nomatmul
