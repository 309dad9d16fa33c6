// The memory beside the accelerator: latency, bandwidth, gaps, refresh, pauses and faults.
#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <deque>
#include <random>
#include <string>
#include <type_traits>

#include "Vbench.h"
#include "options.h"
#include "verilated.h"

constexpr std::size_t kWordBytes = MEMORY_BITS / 8;
constexpr std::size_t kPayloadWords = (MEMORY_BITS + 2 + 31) / 32;  // data, error, last

// A file that is only read, however large.
class Mapped {
 public:
  explicit Mapped(const std::string& path) {
    const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
    struct stat info{};
    if (fd < 0 || fstat(fd, &info) != 0) usage("cannot read " + path);
    size_ = static_cast<std::size_t>(info.st_size);
    if (size_ != 0) {
      void* at = mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, fd, 0);
      if (at == MAP_FAILED) usage("cannot map " + path);
      data_ = static_cast<const std::uint8_t*>(at);
    }
    close(fd);
  }
  Mapped(const Mapped&) = delete;
  Mapped& operator=(const Mapped&) = delete;
  ~Mapped() {
    if (data_ != nullptr) munmap(const_cast<std::uint8_t*>(data_), size_);
  }
  std::size_t size() const { return size_; }
  const std::uint8_t* at(std::size_t offset) const { return data_ + offset; }

 private:
  const std::uint8_t* data_ = nullptr;
  std::size_t size_ = 0;
};

using Payload = std::array<std::uint32_t, kPayloadWords>;

// A port is a number of C++ up to 64 bits, and an array of words above.
template <class T, std::enable_if_t<std::is_integral_v<T>, int> = 0>
void set_port(T& port, const Payload& words) {
  std::uint64_t value = words[0];
  if constexpr (kPayloadWords > 1) value |= static_cast<std::uint64_t>(words[1]) << 32;
  port = static_cast<T>(value);
}

template <std::size_t N>
void set_port(VlWide<N>& port, const Payload& words) {
  static_assert(N == kPayloadWords);
  for (std::size_t i = 0; i < N; ++i) port[i] = words[i];
}

class Memory {
 public:
  Memory(const Options& options, const Mapped& image)
      : o_(options), image_(image), words_(image.size() / kWordBytes) {
    if (o_.stalls) random_.seed(*o_.stalls);
  }

  // Before the clock's edge: what the design and the memory have agreed on.
  void sample(const Vbench& top) {
    if (top.memory_request_valid && ready_) {
      const std::uint64_t payload = top.memory_request_payload;
      queue_.push_back({cycle_ + o_.latency, payload & 0xFFFFFFFFu, (payload >> 32) & 0xFFFFu});
    }
    if (valid_ && top.memory_response_ready) {
      valid_ = false;
      ++delivered_;
    }
  }

  // Behind the edge: what the memory shows in the next cycle.
  void drive(Vbench& top) {
    ++cycle_;
    ready_ = queue_.size() < o_.outstanding && !pauses();
    const double rate = o_.bytes_a_cycle > 0 ? o_.bytes_a_cycle : static_cast<double>(kWordBytes);
    // what is left of a cycle counts in the next one, but an idle memory saves up no more
    credit_ = std::min(credit_ + rate, static_cast<double>(kWordBytes) + rate);
    if (!valid_) next_word(top);
    top.memory_request_ready = ready_;
    top.memory_response_valid = valid_;
  }

  // Of a reset: nothing is under way any more.
  void forget() {
    queue_.clear();
    valid_ = ready_ = false;
  }

  std::uint64_t delivered() const { return delivered_; }
  std::size_t bursts() const { return queue_.size(); }

 private:
  struct Burst {
    std::uint64_t from, address, left;
  };

  bool pauses() { return o_.stalls && random_() % 4 == 0; }

  void next_word(Vbench& top) {
    while (!queue_.empty() && queue_.front().left == 0) queue_.pop_front();
    if (queue_.empty() || cycle_ < queue_.front().from || cycle_ < free_at_) return;
    if (credit_ < static_cast<double>(kWordBytes) || pauses()) return;
    if (o_.refresh_every != 0 && cycle_ % o_.refresh_every < o_.refresh_cycles) return;
    Burst& burst = queue_.front();
    credit_ -= static_cast<double>(kWordBytes);
    --burst.left;
    Payload payload{};
    const bool error = burst.address >= words_ || o_.error == number_;
    if (!error) std::memcpy(payload.data(), image_.at(burst.address * kWordBytes), kWordBytes);
    if (o_.bad_code == number_) std::memset(payload.data(), 0xFF, kWordBytes);
    payload[MEMORY_BITS / 32] |= (error ? 1u : 0u) << (MEMORY_BITS % 32);
    payload[(MEMORY_BITS + 1) / 32] |= (burst.left == 0 ? 1u : 0u) << ((MEMORY_BITS + 1) % 32);
    set_port(top.memory_response_payload, payload);
    ++burst.address;
    ++number_;
    valid_ = true;
    if (burst.left == 0) free_at_ = cycle_ + 1 + o_.gap;
  }

  const Options& o_;
  const Mapped& image_;
  std::uint64_t words_, cycle_ = 0, delivered_ = 0, number_ = 0, free_at_ = 0;
  double credit_ = 0;
  bool ready_ = false, valid_ = false;
  std::deque<Burst> queue_;
  std::mt19937_64 random_;
};
