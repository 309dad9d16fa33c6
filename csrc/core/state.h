// What a sequence leaves behind in a model: named pieces, layer by layer.
#pragma once

#include <algorithm>
#include <cstddef>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/pages.h"

namespace nomatmul {

// So many floats of a sequence, whatever its length, or, where it grows, of each position; then in
// so many heads.
struct StatePiece {
  std::string name;
  int floats;
  bool grows = false;
  int heads = 0;
};

// Where the pieces lie. Those of fixed size stand in an array of floats [layers, S], a layer's
// pieces end to end in its row, as engine/state.py has them: a step works on a copy and hands it
// back when it has succeeded. Those that grow, keys and values, lie in Pages.
class StateLayout {
 public:
  // kv: how growing pieces are kept.
  explicit StateLayout(KvForm kv = KvForm::kHalf) { pages_.strip.form = kv; }

  // The pieces of the next layer, in the order in which its mixer finds them. Throws
  // std::invalid_argument for growing pieces other than keys and values of one shape.
  void add(const std::string& layer, const std::vector<StatePiece>& pieces) {
    size_t floats = 0;
    int growing = 0;
    for (const StatePiece& piece : pieces) {
      if (piece.grows) {
        const int e = piece.floats / piece.heads;
        const bool first = pages_.layers == 0 && growing == 0;
        if (!first && (e != pages_.strip.head_size || piece.heads != pages_.kv_heads)) {
          throw std::invalid_argument(layer + ": keys and values differ in shape between layers");
        }
        pages_.strip.head_size = e;
        pages_.kv_heads = piece.heads;
        ++growing;
      } else {
        floats += piece.floats;
      }
    }
    paged_.push_back(growing > 0 ? pages_.layers++ : -1);
    width_ = std::max(width_, floats);
    ++layers_;
  }

  size_t layers() const { return layers_; }
  size_t width() const { return width_; }  // S, the most that a layer needs
  size_t floats() const { return layers_ * width_; }
  size_t offset(int layer) const { return layer * width_; }
  const PageLayout& pages() const { return pages_; }
  bool grows() const { return pages_.layers > 0; }
  int paged(int layer) const { return paged_[layer]; }  // its number in a page, -1: none

 private:
  size_t layers_ = 0, width_ = 0;
  PageLayout pages_;
  std::vector<int> paged_;
};

}  // namespace nomatmul
