// Keys and values of a sequence, all layers, in pages of kPagePositions positions.
//
// Forks share pages. A sequence writes into positions behind its length only, and copies the last
// page first where it is partly filled and shared; what a step has written counts once advance()
// says so, so a step that fails changes nothing. Going back is a matter of the length.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "core/memory.h"
#include "kernels/attention.h"

namespace nomatmul {

// What a page of a model holds: a strip for each layer that has attention and each kv head.
struct PageLayout {
  StripLayout strip;
  int kv_heads = 0, layers = 0;

  size_t offset(int layer, int head) const {
    return (static_cast<size_t>(layer) * kv_heads + head) * strip.bytes();
  }
  size_t bytes() const { return offset(layers, 0); }
  bool operator==(const PageLayout& other) const {
    return strip.head_size == other.strip.head_size && strip.form == other.strip.form &&
           kv_heads == other.kv_heads && layers == other.layers;
  }
};

class Pages {
 public:
  explicit Pages(const PageLayout& layout) : layout_(layout) {}
  // A copy is a fork: it shares all pages.
  Pages(const Pages&) = default;
  Pages& operator=(const Pages&) = default;

  const PageLayout& layout() const { return layout_; }
  int length() const { return length_; }
  size_t bytes() const { return pages_.size() * layout_.bytes(); }
  // Where each page lies; forks that share a page have the same address.
  const std::vector<uint8_t*>& addresses() const { return addresses_; }

  // Room for positions [length, length + count), which this sequence alone may write until it
  // advances. Throws std::bad_alloc and has changed nothing then.
  void reserve(int count);
  void advance(int count) { length_ += count; }
  // Forgets the positions from `length` on, and room that nothing was kept in.
  void roll_back(int length);

  uint8_t* strip(int position, int layer, int head) const {
    return addresses_[position / kPagePositions] + layout_.offset(layer, head);
  }

  // Keys or values of a layer as they are stored, [length, kv heads, E] of uint16 (float16 bits),
  // int8 or float, and, of int8, their scales [length, kv heads]. load(): of reserved positions up
  // to `count`.
  enum class Piece { kKeys, kValues };
  void save(int layer, Piece piece, void* to, float* scales) const;
  void load(int layer, Piece piece, int count, const void* from, const float* scales);

 private:
  template <class F>
  void with_type(F&& fn) const;
  template <class T, class Copy>
  void each(int layer, Piece piece, int count, Copy copy) const;

  PageLayout layout_;
  int length_ = 0;
  std::vector<std::shared_ptr<Block>> pages_;
  std::vector<uint8_t*> addresses_;
};

}  // namespace nomatmul
