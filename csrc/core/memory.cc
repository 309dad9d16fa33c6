#include "core/memory.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

namespace nomatmul {
namespace {

constexpr size_t kHugePage = size_t{1} << 21;
constexpr size_t kCacheLine = 64;

}  // namespace

Block::Block(size_t bytes) : size_(bytes) {
  if (bytes == 0) return;
  if (bytes < kHugePage) {
    const size_t rounded = round_up(bytes, kCacheLine);
    if (posix_memalign(&data_, kCacheLine, rounded) != 0) throw std::bad_alloc();
    std::memset(data_, 0, rounded);
    return;
  }
  // mmap aligns to 4 KiB only: map one huge page more, then give back both ends.
  if (bytes > SIZE_MAX - 2 * kHugePage) throw std::bad_alloc();
  const size_t want = round_up(bytes, kHugePage);
  void* raw =
      mmap(nullptr, want + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (raw == MAP_FAILED) throw std::bad_alloc();
  const uintptr_t start = reinterpret_cast<uintptr_t>(raw);
  const uintptr_t aligned = round_up(start, kHugePage);
  const size_t before = aligned - start, after = kHugePage - before;
  if (before != 0) munmap(raw, before);
  if (after != 0) munmap(reinterpret_cast<void*>(aligned + want), after);
  data_ = reinterpret_cast<void*>(aligned);
  mapped_ = want;
#ifdef MADV_HUGEPAGE
  madvise(data_, mapped_, MADV_HUGEPAGE);
#endif
}

void Block::release() noexcept {
  if (mapped_ != 0) {
    munmap(data_, mapped_);
  } else {
    std::free(data_);
  }
  data_ = nullptr;
  size_ = mapped_ = 0;
}

Block::~Block() { release(); }

Block::Block(Block&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)),
      size_(std::exchange(other.size_, 0)),
      mapped_(std::exchange(other.mapped_, 0)) {}

Block& Block::operator=(Block&& other) noexcept {
  if (this != &other) {
    release();
    data_ = std::exchange(other.data_, nullptr);
    size_ = std::exchange(other.size_, 0);
    mapped_ = std::exchange(other.mapped_, 0);
  }
  return *this;
}

void Scratch::grow(size_t bytes) {
  block_ = Block();  // give the old memory back before asking for more
  block_ = Block(bytes);
}

}  // namespace nomatmul
