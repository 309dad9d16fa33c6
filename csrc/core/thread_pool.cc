#include "core/thread_pool.h"

#include <sched.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <fstream>
#include <set>
#include <sstream>
#include <string>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace nomatmul {
namespace {

using Clock = std::chrono::steady_clock;

// A worker spins this long after its last task: longer than the serial part between two regions.
constexpr auto kSpin = std::chrono::microseconds(50);
// The caller spins this long for claimed tasks, several times what a task takes; then it sleeps,
// because the thread that it waits for has been put aside and may be able to use this core.
constexpr auto kPatience = std::chrono::microseconds(30);

// What a waiting worker prefetches: well inside every second-level cache of the last decade.
constexpr size_t kPrefetchBytes = 192 * 1024;
constexpr size_t kPrefetchStep = 1024;  // between two looks whether there is work

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

std::string first_line(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

// CPUs granted by the cgroup's quota, 0 if unlimited or unknown. Version 2 first, then version 1;
// inside a container the own cgroup is mounted at the root.
double cgroup_cpus() {
  std::istringstream v2(first_line("/sys/fs/cgroup/cpu.max"));
  std::string quota;
  double period = 0;
  if (v2 >> quota >> period && quota != "max" && period > 0) {
    return std::strtod(quota.c_str(), nullptr) / period;
  }
  const std::string root = "/sys/fs/cgroup/cpu/";
  const double q = std::strtod(first_line(root + "cpu.cfs_quota_us").c_str(), nullptr);
  const double p = std::strtod(first_line(root + "cpu.cfs_period_us").c_str(), nullptr);
  return q > 0 && p > 0 ? q / p : 0;
}

}  // namespace

int default_threads() {
  int cores = 0;
#ifdef __linux__
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof(set), &set) == 0) {
    std::set<std::string> siblings;
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
      if (!CPU_ISSET(cpu, &set)) continue;
      const std::string line = first_line("/sys/devices/system/cpu/cpu" + std::to_string(cpu) +
                                          "/topology/thread_siblings_list");
      siblings.insert(line.empty() ? std::to_string(cpu) : line);
    }
    cores = static_cast<int>(siblings.size());
  }
#endif
  if (cores == 0) cores = static_cast<int>(std::thread::hardware_concurrency());
  const double quota = cgroup_cpus();
  if (quota > 0) cores = std::min(cores, std::max(1, static_cast<int>(quota + 0.5)));
  return std::max(1, cores);
}

ThreadPool::ThreadPool(int threads) : threads_(std::max(1, threads)), shares_(new Share[threads_]) {
  try {
    for (int thread = 1; thread < threads_; ++thread) {
      workers_.emplace_back([this, thread] { work(thread); });
    }
  } catch (...) {  // out of threads: stop those that started, then report
    stop_.store(true);
    wake();
    for (auto& worker : workers_) worker.join();
    throw;
  }
}

ThreadPool::~ThreadPool() {
  stop_.store(true);
  wake();
  for (auto& worker : workers_) worker.join();
}

// A claim that succeeds belongs to the current region, because a region cannot end before its
// claimed tasks do; so task_ and context_ may be read after it.
bool ThreadPool::claim(int thread, int* task) {
  for (int turn = 0; turn < threads_; ++turn) {
    const int owner = thread + turn < threads_ ? thread + turn : thread + turn - threads_;
    std::atomic<uint64_t>& range = shares_[owner].range;
    uint64_t seen = range.load(std::memory_order_acquire);
    for (;;) {
      const uint32_t next = static_cast<uint32_t>(seen), end = static_cast<uint32_t>(seen >> 32);
      if (next >= end) break;
      const uint64_t rest = turn == 0 ? seen + 1 : seen - (uint64_t{1} << 32);
      if (range.compare_exchange_weak(seen, rest, std::memory_order_acq_rel,
                                      std::memory_order_acquire)) {
        *task = static_cast<int>(turn == 0 ? next : end - 1);
        return true;
      }
    }
  }
  return false;
}

void ThreadPool::dispatch(int tasks, Task task, void* context) {
  task_ = task;
  context_ = context;
  pending_.store(tasks, std::memory_order_relaxed);
  for (int thread = 0; thread < threads_; ++thread) {
    const uint64_t begin = share_begin(tasks, thread), end = share_begin(tasks, thread + 1);
    shares_[thread].range.store(end << 32 | begin, std::memory_order_release);
  }
  epoch_.fetch_add(1, std::memory_order_seq_cst);
  if (sleepers_.load(std::memory_order_seq_cst) > 0) {
    ++troubles_;
    wake();
  }
  int done = 0, mine;
  while (claim(0, &mine)) {
    task(context, mine, 0);
    ++done;
  }
  if (pending_.fetch_sub(done, std::memory_order_seq_cst) != done) wait_for_others();
}

void ThreadPool::wait_for_others() {
  const auto start = Clock::now();
  for (int turn = 1; pending_.load(std::memory_order_acquire) != 0; ++turn) {
    relax();
    if (turn % 32 == 0 && Clock::now() - start > kPatience) break;
  }
  if (pending_.load(std::memory_order_acquire) == 0) return;
  {
    std::unique_lock<std::mutex> lock(mutex_);
    caller_sleeps_.store(true, std::memory_order_seq_cst);
    done_.wait(lock, [this] { return pending_.load(std::memory_order_seq_cst) == 0; });
    caller_sleeps_.store(false, std::memory_order_relaxed);
  }
  ++troubles_;
}

// A worker's tasks are done. The last one wakes the caller if it sleeps.
void ThreadPool::finish(int tasks) {
  if (pending_.fetch_sub(tasks, std::memory_order_seq_cst) != tasks) return;
  if (!caller_sleeps_.load(std::memory_order_seq_cst)) return;
  std::lock_guard<std::mutex> lock(mutex_);
  done_.notify_one();
}

void ThreadPool::wake() {
  epoch_.fetch_add(1, std::memory_order_seq_cst);
  if (sleepers_.load(std::memory_order_seq_cst) == 0) return;
  std::lock_guard<std::mutex> lock(mutex_);
  condition_.notify_all();
}

void ThreadPool::hint(const void* const* bases, int count, size_t bytes, int tasks) {
  if (alone()) return;
  for (int i = 0; i < kHintBases; ++i) {
    hint_bases_[i].store(i < count ? static_cast<const char*>(bases[i]) : nullptr,
                         std::memory_order_relaxed);
  }
  hint_bytes_.store(bytes, std::memory_order_relaxed);
  hint_tasks_.store(tasks, std::memory_order_relaxed);
  hint_epoch_.store(epoch_.load(std::memory_order_relaxed), std::memory_order_release);
}

// A hint may be replaced while it is read: a mixture makes a useless prefetch, which never faults.
void ThreadPool::prefetch(int thread, uint32_t seen) const {
  const int tasks = hint_tasks_.load(std::memory_order_relaxed);
  const size_t bytes = hint_bytes_.load(std::memory_order_relaxed);
  const int begin = share_begin(tasks, thread), end = share_begin(tasks, thread + 1);
  size_t left = kPrefetchBytes;
  for (int task = begin; task < end; ++task) {
    for (const auto& slot : hint_bases_) {
      const char* base = slot.load(std::memory_order_relaxed);
      if (base == nullptr) continue;
      for (size_t at = 0; at < bytes; at += kPrefetchStep) {
        if (left < kPrefetchStep || epoch_.load(std::memory_order_relaxed) != seen) return;
        left -= kPrefetchStep;
        const char* line = base + task * bytes + at;
        for (size_t i = 0; i < kPrefetchStep; i += 64) __builtin_prefetch(line + i, 0, 2);
      }
    }
  }
}

void ThreadPool::work(int thread) {
  while (!stop_.load(std::memory_order_acquire)) {
    const uint32_t seen = epoch_.load(std::memory_order_seq_cst);
    int mine;
    while (claim(thread, &mine)) {
      task_(context_, mine, thread);
      finish(1);
    }
    if (!spin(thread, seen)) sleep(seen);
  }
}

// True as soon as something happens; false when the time is up.
bool ThreadPool::spin(int thread, uint32_t seen) {
  const auto start = Clock::now();
  bool fetched = false;
  for (;;) {
    for (int turn = 0; turn < 64; ++turn) {
      if (epoch_.load(std::memory_order_acquire) != seen) return true;
      if (!fetched && hint_epoch_.load(std::memory_order_acquire) == seen) {
        fetched = true;
        prefetch(thread, seen);
      }
      relax();
    }
    if (Clock::now() - start > kSpin) return false;
  }
}

void ThreadPool::sleep(uint32_t seen) {
  std::unique_lock<std::mutex> lock(mutex_);
  sleepers_.fetch_add(1, std::memory_order_seq_cst);
  condition_.wait(lock, [this, seen] { return epoch_.load(std::memory_order_seq_cst) != seen; });
  sleepers_.fetch_sub(1, std::memory_order_seq_cst);
}

}  // namespace nomatmul
