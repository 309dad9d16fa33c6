// Decides whether the workers help. A decode step has about a hundred short parallel regions. On a
// machine that others use, workers are put aside in the middle of a task, or share a core with the
// caller and take it away while they spin: two threads become slower than one. So when steps show
// such trouble, a few are done the other way, alone, and the faster way is kept until the next
// trial. Trials that change nothing become rarer. Results do not depend on any of it.
#pragma once

#include <algorithm>

namespace nomatmul {

class Pacer {
 public:
  bool alone() const { return alone_; }

  // Tells how long the last step took and in how many of its regions something went wrong (see
  // ThreadPool::troubles).
  void add(double seconds, int troubles) {
    total_ += seconds;
    troubles_ += troubles;
    ++steps_;
    if (trial_) {
      const bool hopeless = steps_ >= 2 && total_ > 1.5 * other_mean_ * steps_;
      if (steps_ < kTrialSteps && !hopeless) return;
      const bool better = !hopeless && total_ < other_mean_ * steps_;
      interval_ = better ? kFirstInterval : std::min(2 * interval_, kLastInterval);
      if (!better) alone_ = !alone_;
      trial_ = false;
    } else {
      if (steps_ < interval_) return;
      if (alone_ || troubles_ > kTroublesPerStep * steps_) {
        trial_ = true;
        other_mean_ = total_ / steps_;
        alone_ = !alone_;
      }
    }
    total_ = 0;
    troubles_ = steps_ = 0;
  }

 private:
  static constexpr int kFirstInterval = 16;  // steps between trials
  static constexpr int kLastInterval = 512;
  static constexpr int kTrialSteps = 6;
  static constexpr int kTroublesPerStep = 3;

  bool alone_ = false, trial_ = false;
  int steps_ = 0, troubles_ = 0, interval_ = kFirstInterval;
  double total_ = 0, other_mean_ = 0;
};

}  // namespace nomatmul
