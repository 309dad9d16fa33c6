#include "core/pages.h"

#include <cstring>

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

// copy(first, stride, scale) for each position and head in order: where its values begin, how far
// they lie apart, and where its scale is.
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

// fn(a value of the type that keys and values are stored as)
template <class F>
void Pages::with_type(F&& fn) const {
  switch (layout_.strip.form) {
    case KvForm::kHalf:
      return fn(uint16_t{});
    case KvForm::kInt8:
      return fn(int8_t{});
    case KvForm::kFloat:
      return fn(float{});
  }
}

void Pages::save(int layer, Piece piece, void* to, float* scales) const {
  with_type([&](auto type) {
    using T = decltype(type);
    T* out = static_cast<T*>(to);
    each<T>(layer, piece, length_, [&](const T* from, int stride, const float* scale) {
      for (int i = 0; i < layout_.strip.head_size; ++i) *out++ = from[i * stride];
      if (layout_.strip.scaled()) *scales++ = *scale;
    });
  });
}

void Pages::load(int layer, Piece piece, int count, const void* from, const float* scales) {
  with_type([&](auto type) {
    using T = decltype(type);
    const T* in = static_cast<const T*>(from);
    each<T>(layer, piece, count, [&](T* to, int stride, float* scale) {
      for (int i = 0; i < layout_.strip.head_size; ++i) to[i * stride] = *in++;
      if (layout_.strip.scaled()) *scale = *scales++;
    });
  });
}

}  // namespace nomatmul
