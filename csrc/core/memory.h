// Memory of 2 MiB pages for weights and scratch. Decode reads every weight once per token, so the
// cost of address translation is paid on every byte: with 4 KiB pages reads are several times
// slower than with huge ones.
#pragma once

#include <cstddef>

namespace nomatmul {

constexpr size_t round_up(size_t value, size_t step) { return (value + step - 1) / step * step; }

// One zeroed block, aligned to 2 MiB when it is at least that large, else to 64 bytes. Transparent
// huge pages are asked for, not demanded: where the kernel refuses, plain pages serve.
// Throws std::bad_alloc.
class Block {
 public:
  Block() = default;
  explicit Block(size_t bytes);
  ~Block();
  Block(Block&& other) noexcept;
  Block& operator=(Block&& other) noexcept;
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  void* data() const { return data_; }
  size_t size() const { return size_; }
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void release() noexcept;
  void* data_ = nullptr;
  size_t size_ = 0;
  size_t mapped_ = 0;  // bytes given by mmap; 0 for a small block from the heap
};

// A buffer that only grows; its old content is dropped when it does.
class Scratch {
 public:
  template <class T>
  T* need(size_t count) {
    if (count * sizeof(T) > block_.size()) grow(count * sizeof(T));
    return block_.as<T>();
  }
  // What was last asked for.
  template <class T>
  T* data() const {
    return block_.as<T>();
  }
  size_t size() const { return block_.size(); }

 private:
  void grow(size_t bytes);
  Block block_;
};

}  // namespace nomatmul
