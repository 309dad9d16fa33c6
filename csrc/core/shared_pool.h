// The threads and buffers of everything that Python calls layer by layer: conditional layers and
// single linears. They share one pool, because they take turns: threads of a second pool would
// still spin after their last step, on the cores that the first one needs.
#pragma once

#include <unistd.h>

#include <map>
#include <memory>
#include <mutex>

#include "core/channels/fff.h"
#include "core/thread_pool.h"

namespace nomatmul {

// Pools by size, made when first asked for; one caller at a time.
class SharedPools {
 public:
  // Calls fn(pool, buffers) with a pool of `threads`, waiting for it where another caller has it.
  template <class F>
  void with(int threads, F&& fn) {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::unique_ptr<ThreadPool>& pool = pools_[threads];
    if (pool == nullptr) pool = std::make_unique<ThreadPool>(threads);
    fn(*pool, buffers_);
  }

  // The pools of this process. Call with the GIL held: a forked child, where the threads do not
  // exist and one of them may have been changing the rest, leaks the old ones on purpose.
  static SharedPools& get() {
    static SharedPools* pools = new SharedPools;  // never destroyed: threads outlive statics
    if (getpid() != pools->owner_) pools = new SharedPools;
    return *pools;
  }

 private:
  std::mutex mutex_;
  std::map<int, std::unique_ptr<ThreadPool>> pools_;
  FffWork buffers_;
  const pid_t owner_ = getpid();
};

}  // namespace nomatmul
