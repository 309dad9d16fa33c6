// Decides whether the helpers help. On a machine that others use, a helper is often put aside in
// the middle of a task, and a decode step with a hundred short regions then waits a hundred times:
// two threads become slower than one. So when steps stall, a few are done alone, and the faster way
// is kept until the next trial. Results do not depend on it.
#pragma once

namespace nomatmul {

class Pacer {
 public:
  bool alone() const { return alone_; }

  // Tells how long the last step took and how much of that was stalling (see ThreadPool).
  void add(double seconds, double stalled) {
    total_ += seconds;
    stalled_ += stalled;
    if (++steps_ < (trial_ ? kTrialSteps : alone_ ? kAloneSteps : kWatchSteps)) return;
    const double mean = total_ / steps_;
    if (trial_) {
      trial_ = false;
      if (mean > other_mean_) alone_ = !alone_;  // the old way was the faster one
    } else if (alone_ || stalled_ > kStallShare * total_) {
      trial_ = true;
      other_mean_ = mean;
      alone_ = !alone_;
    }
    total_ = stalled_ = 0;
    steps_ = 0;
  }

 private:
  static constexpr int kWatchSteps = 16;   // before helped steps are judged
  static constexpr int kTrialSteps = 6;    // of the other way
  static constexpr int kAloneSteps = 120;  // before helpers get another chance
  static constexpr double kStallShare = 0.15;

  bool alone_ = false, trial_ = false;
  int steps_ = 0;
  double total_ = 0, stalled_ = 0, other_mean_ = 0;
};

}  // namespace nomatmul
