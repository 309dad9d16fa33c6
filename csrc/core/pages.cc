#include "core/pages.h"

#include <cstring>
#include <type_traits>

namespace nomatmul {
namespace {

int pages_of(int positions) { return (positions + kPagePositions - 1) / kPagePositions; }

}  // namespace

void Pages::reserve(int count) {
  const size_t wanted = pages_of(length_ + count);
  std::vector<std::shared_ptr<Block>> pages = pages_;
  const size_t last = length_ / kPagePositions;  // the page of the next position
  if (length_ % kPagePositions != 0 && count > 0 && pages_[last].use_count() > 2) {
    pages[last] = std::make_shared<Block>(layout_.bytes());
    std::memcpy(pages[last]->data(), pages_[last]->data(), layout_.bytes());
  }
  while (pages.size() < wanted) pages.push_back(std::make_shared<Block>(layout_.bytes()));
  std::vector<uint8_t*> addresses;
  addresses.reserve(pages.size());
  for (const auto& page : pages) addresses.push_back(page->as<uint8_t>());
  pages_ = std::move(pages);
  addresses_ = std::move(addresses);
}

void Pages::roll_back(int length) {
  length_ = length;
  pages_.resize(pages_of(length));
  addresses_.resize(pages_.size());
}

// copy(element, scale) with a reference to each stored value of a position and head in order, the
// scale being nullptr but for the first of them, and of int8.
template <class T, class Copy>
void Pages::each(int layer, Piece piece, int count, Copy copy) const {
  const StripLayout& strip = layout_.strip;
  const bool keys = piece == Piece::kKeys;
  for (int position = 0; position < count; ++position) {
    const int slot = position % kPagePositions;
    for (int head = 0; head < layout_.kv_heads; ++head) {
      uint8_t* at = this->strip(position, layer, head);
      auto* scale = reinterpret_cast<float*>(at + strip.scales()) + slot;
      auto* from = reinterpret_cast<T*>(keys ? at : at + strip.values()) +
                   (keys ? slot : slot * strip.padded());
      copy(from, keys ? kPagePositions : 1, keys ? scale : scale + kPagePositions);
    }
  }
}

void Pages::save(int layer, Piece piece, void* to, float* scales) const {
  const int e = layout_.strip.head_size;
  const auto save_all = [&](auto* out) {
    using T = std::remove_reference_t<decltype(*out)>;
    each<T>(layer, piece, length_, [&](const T* from, int stride, const float* scale) {
      for (int i = 0; i < e; ++i) *out++ = from[i * stride];
      if (layout_.strip.int8) *scales++ = *scale;
    });
  };
  if (layout_.strip.int8) {
    save_all(static_cast<int8_t*>(to));
  } else {
    save_all(static_cast<uint16_t*>(to));
  }
}

void Pages::load(int layer, Piece piece, int count, const void* from, const float* scales) {
  const int e = layout_.strip.head_size;
  const auto load_all = [&](auto* in) {
    using T = std::remove_const_t<std::remove_reference_t<decltype(*in)>>;
    each<T>(layer, piece, count, [&](T* to, int stride, float* scale) {
      for (int i = 0; i < e; ++i) to[i * stride] = *in++;
      if (layout_.strip.int8) *scale = *scales++;
    });
  };
  if (layout_.strip.int8) {
    load_all(static_cast<const int8_t*>(from));
  } else {
    load_all(static_cast<const uint16_t*>(from));
  }
}

}  // namespace nomatmul
