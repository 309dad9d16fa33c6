// A small pool for the model step: about a hundred parallel regions per token, some only tens of
// microseconds long, on machines that other processes share.
//
// Each thread has a share of neighbouring tasks, claims them one at a time from the front, and then
// takes tasks from the back of the others' shares. So a thread that the kernel has put aside costs
// at most the task that it holds; the caller works too and never waits for a thread to arrive, only
// for tasks that were claimed. Workers spin shortly between regions, then sleep. While they spin
// they may fetch the front of their next share into their own cache (hint).
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
    if (tasks == 1 || alone()) {
      for (int task = 0; task < tasks; ++task) fn(task, 0);
      return;
    }
    using Fn = std::remove_reference_t<F>;
    dispatch(
        tasks,
        [](void* context, int task, int thread) { (*static_cast<Fn*>(context))(task, thread); },
        const_cast<void*>(static_cast<const void*>(&fn)));
  }

  // With true, run() does all tasks on the calling thread.
  void set_alone(bool alone) { alone_ = alone; }
  bool alone() const { return alone_ || threads_ == 1; }
  // Regions so far that found a worker asleep, or waited for one that was put aside in a task.
  int troubles() const { return troubles_; }

  // Tells workers what the next region will read: task t reads `bytes` bytes at bases[i] + t *
  // bytes for each base. Only a hint: nothing depends on it.
  void hint(const void* const* bases, int count, size_t bytes, int tasks);

  // Wakes sleeping workers ahead of the first region, so that waking overlaps with other work.
  void wake();

 private:
  using Task = void (*)(void* context, int task, int thread);
  static constexpr int kHintBases = 3;
  // Unclaimed tasks of one thread: the next one in the low half, the end in the high half.
  struct alignas(64) Share {
    std::atomic<uint64_t> range{0};
  };

  void dispatch(int tasks, Task task, void* context);
  void wait_for_others();
  void finish(int tasks);
  bool claim(int thread, int* task);
  int share_begin(int tasks, int thread) const {
    return static_cast<int>(static_cast<int64_t>(tasks) * thread / threads_);
  }
  void work(int thread);
  bool spin(int thread, uint32_t seen);
  void sleep(uint32_t seen);
  void prefetch(int thread, uint32_t seen) const;

  const int threads_;
  bool alone_ = false;
  int troubles_ = 0;
  std::unique_ptr<Share[]> shares_;
  alignas(64) std::atomic<int> pending_{0};     // tasks of the region that are not done
  alignas(64) std::atomic<uint32_t> epoch_{0};  // counts regions and wake-ups
  std::atomic<int> sleepers_{0};
  std::atomic<bool> stop_{false};
  Task task_ = nullptr;
  void* context_ = nullptr;
  alignas(64) std::atomic<uint32_t> hint_epoch_{~0u};  // the epoch in which the hint was given
  std::atomic<const char*> hint_bases_[kHintBases] = {};
  std::atomic<size_t> hint_bytes_{0};
  std::atomic<int> hint_tasks_{0};
  std::mutex mutex_;
  std::condition_variable condition_;
  std::atomic<bool> caller_sleeps_{false};
  std::condition_variable done_;
  std::vector<std::thread> workers_;
};

}  // namespace nomatmul
