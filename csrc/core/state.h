// What a sequence leaves behind in a model: named pieces, layer by layer.
#pragma once

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

// Where the pieces lie. Those of fixed size stand end to end, layer by layer, in one array of
// floats: a step works on a copy and hands it back when it has succeeded. Pieces that grow (keys
// and values) need a place of their own, which this core does not have.
class StateLayout {
 public:
  // The pieces of the next layer, in the order in which its mixer finds them.
  void add(const std::string& layer, const std::vector<StatePiece>& pieces) {
    size_t end = starts_.back();
    for (const StatePiece& piece : pieces) {
      if (piece.grows) {
        throw std::invalid_argument(layer + ": its state " + piece.name +
                                    " grows with the sequence, which this core does not hold");
      }
      end += piece.floats;
    }
    starts_.push_back(end);
  }

  size_t floats() const { return starts_.back(); }  // of all layers
  size_t floats(int layer) const { return starts_[layer + 1] - starts_[layer]; }
  size_t offset(int layer) const { return starts_[layer]; }

 private:
  std::vector<size_t> starts_{0};  // of each layer, and the end
};

}  // namespace nomatmul
