// A small pool for the model step: about a hundred parallel regions per token, some only tens of
// microseconds long, on machines that other processes share.
//
// Tasks are claimed one at a time, so a thread that the kernel has put aside costs at most the
// task that it holds; the caller works too and never waits for a thread to arrive, only for tasks
// that were claimed. Workers spin shortly between regions, then sleep.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

namespace nomatmul {

// Physical cores this process may use: affinity mask, SMT siblings counted once, cgroup CPU quota.
int default_threads();

class ThreadPool {
 public:
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return threads_; }

  // Calls fn(task, thread) for every task in [0, tasks), thread in [0, size()). Returns when all
  // are done. fn must not throw. One caller at a time.
  template <class F>
  void run(int tasks, F&& fn) {
    if (tasks <= 0) return;
    if (threads_ == 1 || tasks == 1) {
      for (int task = 0; task < tasks; ++task) fn(task, 0);
      return;
    }
    using Fn = std::remove_reference_t<F>;
    dispatch(
        tasks,
        [](void* context, int task, int thread) { (*static_cast<Fn*>(context))(task, thread); },
        const_cast<void*>(static_cast<const void*>(&fn)));
  }

  // Wakes sleeping workers ahead of the first region, so that waking overlaps with other work.
  void wake();

  // In a forked child the workers do not exist. Forgets them without touching their handles.
  static void abandon(std::unique_ptr<ThreadPool> pool) { (void)pool.release(); }

 private:
  using Task = void (*)(void* context, int task, int thread);
  void dispatch(int tasks, Task task, void* context);
  bool claim(int* task);
  bool has_work() const;
  void work(int thread);
  bool spin();
  void sleep();

  const int threads_;
  // high half: tasks in this region, low half: next unclaimed one
  alignas(64) std::atomic<uint64_t> ticket_{0};
  alignas(64) std::atomic<int> pending_{0};
  alignas(64) std::atomic<int> sleepers_{0};
  std::atomic<uint32_t> wakes_{0};
  std::atomic<bool> stop_{false};
  Task task_ = nullptr;
  void* context_ = nullptr;
  std::mutex mutex_;
  std::condition_variable condition_;
  std::vector<std::thread> workers_;
};

}  // namespace nomatmul
