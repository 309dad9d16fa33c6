// What fff.cc (one piece of a batch) and fff_batches.cc (how a batch is cut) share.
#pragma once

#include <atomic>
#include <climits>
#include <stdexcept>
#include <string>

#include "core/channels/fff.h"

namespace nomatmul {

// Walkers that descend together: their cache misses overlap.
constexpr int kWalkers = 16;
// Bytes that surely stay in a core's own cache while other things pass through it.
constexpr size_t kCacheBytes = 256 * 1024;

inline size_t round64(size_t value) { return round_up(value, 64); }

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
  uint8_t* prepared;
  float* steps;
  int32_t* sums;
  int32_t* rows;
  float* logits;

  int token(int i) const { return index == nullptr ? begin + i : index[i]; }
};

}  // namespace nomatmul
