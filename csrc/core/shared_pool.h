// The threads of everything that Python calls step by step: an encoder's steps and conditional
// layers. They share one pool, because they take turns within a forward pass: threads of a second
// pool would still spin after their last step, on the cores that the first one needs.
#pragma once

#include <unistd.h>

#include <map>
#include <memory>
#include <mutex>
#include <utility>

#include "core/thread_pool.h"

namespace nomatmul {

// Pools by size, made when first asked for. A pool serves one caller at a time.
class SharedPools {
 public:
  // Calls fn(task, thread) for each task; where another caller has the threads, alone.
  template <class F>
  void run(int threads, int tasks, F&& fn) {
    std::unique_lock<std::mutex> lock(*mutex_, std::defer_lock);
    if (threads <= 1 || tasks <= 1 || !lock.try_lock()) {
      for (int task = 0; task < tasks; ++task) fn(task, 0);
      return;
    }
    of(threads).run(tasks, fn);
  }

  // Calls fn(pool) with a pool of `threads`, waiting for it where another caller has it.
  template <class F>
  void with(int threads, F&& fn) {
    if (threads <= 1) {
      ThreadPool alone(1);
      return fn(alone);
    }
    const std::lock_guard<std::mutex> lock(*mutex_);
    fn(of(threads));
  }

  // The pools of this process. Call with the GIL held: in a forked child, where the threads do not
  // exist, it starts afresh.
  static SharedPools& get() {
    static SharedPools* const pools = new SharedPools;  // never destroyed: threads outlive statics
    if (getpid() != pools->owner_) pools->forget();
    return *pools;
  }

 private:
  ThreadPool& of(int threads) {
    std::unique_ptr<ThreadPool>& pool = pools_[threads];
    if (pool == nullptr) pool = std::make_unique<ThreadPool>(threads);
    return *pool;
  }

  void forget() {
    for (auto& [threads, pool] : pools_) ThreadPool::abandon(std::move(pool));
    pools_.clear();
    (void)mutex_.release();  // may be held by a thread that is not here
    mutex_.reset(new std::mutex);
    owner_ = getpid();
  }

  std::unique_ptr<std::mutex> mutex_{new std::mutex};
  std::map<int, std::unique_ptr<ThreadPool>> pools_;
  pid_t owner_ = getpid();
};

}  // namespace nomatmul
