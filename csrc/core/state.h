// What a sequence leaves behind in a model: named pieces, layer by layer.
#pragma once

#include <algorithm>
#include <cstddef>
#include <stdexcept>
#include <string>
#include <vector>

namespace nomatmul {

// So many floats of a sequence, whatever its length, or, where it grows, of each position.
struct StatePiece {
  std::string name;
  int floats;
  bool grows = false;
};

// Where the pieces lie. Those of fixed size stand in an array of floats [layers, S], a layer's
// pieces end to end in its row, as engine/state.py has them: a step works on a copy and hands it
// back when it has succeeded. Pieces that grow (keys and values) need a place of their own, which
// this core does not have.
class StateLayout {
 public:
  // The pieces of the next layer, in the order in which its mixer finds them.
  void add(const std::string& layer, const std::vector<StatePiece>& pieces) {
    size_t floats = 0;
    for (const StatePiece& piece : pieces) {
      if (piece.grows) {
        throw std::invalid_argument(layer + ": its state " + piece.name +
                                    " grows with the sequence, which this core does not hold");
      }
      floats += piece.floats;
    }
    width_ = std::max(width_, floats);
    ++layers_;
  }

  size_t layers() const { return layers_; }
  size_t width() const { return width_; }  // S, the most that a layer needs
  size_t floats() const { return layers_ * width_; }
  size_t offset(int layer) const { return layer * width_; }

 private:
  size_t layers_ = 0, width_ = 0;
};

}  // namespace nomatmul
