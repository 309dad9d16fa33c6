#include "thread_pool.h"

#include <sched.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
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

// A worker spins this long after its last task: longer than the serial part between two regions,
// about as long as the caller needs between two tokens of a small model.
constexpr auto kSpin = std::chrono::microseconds(200);
// The caller waits this long for claimed tasks before it lets others have its core.
constexpr auto kPatience = std::chrono::microseconds(30);

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

ThreadPool::ThreadPool(int threads) : threads_(std::max(1, threads)) {
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

bool ThreadPool::has_work() const {
  const uint64_t ticket = ticket_.load(std::memory_order_seq_cst);
  return (ticket & 0xffffffffu) < (ticket >> 32);
}

// A claim that succeeds belongs to the current region, because a region cannot end before its
// claimed tasks do; so task_ and context_ may be read after it.
bool ThreadPool::claim(int* task) {
  uint64_t ticket = ticket_.load(std::memory_order_acquire);
  while ((ticket & 0xffffffffu) < (ticket >> 32)) {
    if (ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel,
                                      std::memory_order_acquire)) {
      *task = static_cast<int>(ticket & 0xffffffffu);
      return true;
    }
  }
  return false;
}

void ThreadPool::dispatch(int tasks, Task task, void* context) {
  task_ = task;
  context_ = context;
  pending_.store(tasks, std::memory_order_relaxed);
  ticket_.store(static_cast<uint64_t>(tasks) << 32, std::memory_order_seq_cst);
  if (sleepers_.load(std::memory_order_seq_cst) > 0) wake();
  int done = 0, mine;
  while (claim(&mine)) {
    task(context, mine, 0);
    ++done;
  }
  if (done != 0) pending_.fetch_sub(done, std::memory_order_acq_rel);
  if (pending_.load(std::memory_order_acquire) == 0) return;
  const auto start = Clock::now();
  int turns = 0;
  while (pending_.load(std::memory_order_acquire) != 0) {
    relax();
    if ((++turns & 63) == 0 && Clock::now() - start > kPatience) sched_yield();
  }
}

void ThreadPool::wake() {
  wakes_.fetch_add(1, std::memory_order_seq_cst);
  if (sleepers_.load(std::memory_order_seq_cst) == 0) return;
  std::lock_guard<std::mutex> lock(mutex_);
  condition_.notify_all();
}

void ThreadPool::work(int thread) {
  while (!stop_.load(std::memory_order_acquire)) {
    int mine;
    while (claim(&mine)) {
      task_(context_, mine, thread);
      pending_.fetch_sub(1, std::memory_order_acq_rel);
    }
    if (!spin()) sleep();
  }
}

// True as soon as there is work (or an end); false when the time is up.
bool ThreadPool::spin() {
  const auto start = Clock::now();
  for (;;) {
    for (int turn = 0; turn < 64; ++turn) {
      if (has_work() || stop_.load(std::memory_order_acquire)) return true;
      relax();
    }
    if (Clock::now() - start > kSpin) return false;
  }
}

void ThreadPool::sleep() {
  std::unique_lock<std::mutex> lock(mutex_);
  const uint32_t seen = wakes_.load(std::memory_order_seq_cst);
  sleepers_.fetch_add(1, std::memory_order_seq_cst);
  condition_.wait(lock, [this, seen] {
    return has_work() || stop_.load(std::memory_order_seq_cst) ||
           wakes_.load(std::memory_order_seq_cst) != seen;
  });
  sleepers_.fetch_sub(1, std::memory_order_seq_cst);
}

}  // namespace nomatmul
