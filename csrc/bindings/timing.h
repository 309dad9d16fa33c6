// Products timed on several threads, for the benchmarks.
#pragma once

#include <algorithm>
#include <chrono>
#include <thread>
#include <vector>

#include "bindings/common.h"
#include "core/whole_product.h"

namespace nomatmul {

// Seconds of each of `repeats` runs of run(repeat, first row, end, scratch), without the GIL. Rows
// are split over threads in whole blocks of 64, as the engine splits; every thread runs all repeats
// over its own rows, and the slowest one's time counts.
template <class Run>
std::vector<double> seconds_of(int rows, int threads, int repeats, size_t scratch_bytes, Run run) {
  checked_threads(threads);
  require(1 <= repeats && repeats <= 1000000, "repeats must be 1 to 1000000");
  std::vector<std::vector<double>> seconds(static_cast<size_t>(threads));
  const auto work = [&](int thread) {
    ExactBuffer scratch(scratch_bytes);
    const int blocks = (rows + 63) / 64;
    const int from = static_cast<int>(int64_t{blocks} * thread / threads * 64);
    const int end = static_cast<int>(int64_t{blocks} * (thread + 1) / threads * 64);
    for (int r = 0; r < repeats; ++r) {
      const auto start = std::chrono::steady_clock::now();
      run(r, from, std::min(end, rows), scratch.data());
      const std::chrono::duration<double> spent = std::chrono::steady_clock::now() - start;
      seconds[static_cast<size_t>(thread)].push_back(spent.count());
    }
  };
  nb::gil_scoped_release released;
  std::vector<std::thread> others;
  for (int thread = 1; thread < threads; ++thread) others.emplace_back(work, thread);
  work(0);
  for (std::thread& other : others) other.join();
  std::vector<double> slowest = seconds[0];
  for (const std::vector<double>& one : seconds) {
    for (size_t r = 0; r < slowest.size(); ++r) slowest[r] = std::max(slowest[r], one[r]);
  }
  return slowest;
}

}  // namespace nomatmul
