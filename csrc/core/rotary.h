// Rotary positions: pairs (i, i + half) of a head turn by position * inverse[i].
#pragma once

#include <cmath>
#include <string>
#include <vector>

#include "core/description.h"

namespace nomatmul {

// Radians a position of each pair, and what cosines and sines are multiplied by.
struct Frequencies {
  std::vector<double> inverse;
  float factor = 1;

  static Frequencies of(const Description& description) {
    Frequencies found;
    const int half = description.whole("count", 1, 1 << 20);
    for (int i = 0; i < half; ++i) found.inverse.push_back(description.number(std::to_string(i)));
    found.factor = static_cast<float>(description.number("factor"));
    return found;
  }
  bool operator==(const Frequencies& other) const {
    return inverse == other.inverse && factor == other.factor;
  }
};

// Cosines and sines of a chunk's tokens; layers of the same frequencies share them.
class RotaryTable {
 public:
  void forget() { tokens_ = 0; }
  // position(token) of each token. To be called by one thread.
  template <class Position>
  void fill(const Frequencies& frequencies, int tokens, Position position) {
    if (tokens_ == tokens && frequencies_ == frequencies) return;
    frequencies_ = frequencies;
    tokens_ = tokens;
    const size_t half = frequencies.inverse.size();
    values_.resize(tokens * 2 * half);
    for (int t = 0; t < tokens; ++t) {
      float* cos = values_.data() + t * 2 * half;
      for (size_t i = 0; i < half; ++i) {
        const double angle = position(t) * frequencies.inverse[i];
        cos[i] = static_cast<float>(std::cos(angle)) * frequencies.factor;
        cos[half + i] = static_cast<float>(std::sin(angle)) * frequencies.factor;
      }
    }
  }
  // Turns one head's row [2 * half].
  void turn(int token, float* row) const {
    const size_t half = frequencies_.inverse.size();
    const float *cos = values_.data() + token * 2 * half, *sin = cos + half;
    for (size_t i = 0; i < half; ++i) {
      const float first = row[i], second = row[i + half];
      row[i] = first * cos[i] - second * sin[i];
      row[i + half] = second * cos[i] + first * sin[i];
    }
  }

 private:
  Frequencies frequencies_;
  int tokens_ = 0;
  std::vector<float> values_;  // of each token: cosines, sines
};

}  // namespace nomatmul
