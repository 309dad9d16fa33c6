#include "core/tensors.h"

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <utility>

namespace nomatmul {

void Tensors::add_copied(const std::string& name, DType dtype, size_t count,
                         std::function<void(const void*)> take) {
  slots_[name] = {dtype, count * width_of(dtype), false, std::move(take)};
  missing_.insert(name);
}

uint8_t* Tensors::room(size_t bytes) {
  constexpr size_t kShared = size_t{64} << 20;  // of a block; what is not used is never touched
  const size_t whole = round_up(bytes, 64);
  if (rooms_.empty() || rooms_.back().size() - used_ < whole) {
    rooms_.emplace_back(std::max(whole, kShared));
    used_ = 0;
  }
  uint8_t* at = rooms_.back().as<uint8_t>() + used_;
  used_ += whole;
  return at;
}

bool Tensors::set(const std::string& name, const void* data, size_t bytes, DType dtype) {
  const auto found = slots_.find(name);
  if (found == slots_.end()) throw std::invalid_argument("no tensor " + name + " in this model");
  const Slot& slot = found->second;
  if (dtype != slot.dtype) throw std::invalid_argument(name + " has the wrong dtype");
  if (bytes != slot.bytes) {
    throw std::invalid_argument(name + " has " + std::to_string(bytes) + " bytes, expected " +
                                std::to_string(slot.bytes));
  }
  if (dtype == DType::kF32 && reinterpret_cast<uintptr_t>(data) % alignof(float) != 0) {
    throw std::invalid_argument(name + " is not aligned to 4 bytes");
  }
  slot.take(data);
  const std::lock_guard<std::mutex> lock(mutex_);
  missing_.erase(name);
  return slot.kept;
}

void Tensors::check_complete() const {
  if (missing_.empty()) return;
  throw std::invalid_argument(std::to_string(missing_.size()) + " tensors are missing, " +
                              *missing_.begin() + " among them");
}

}  // namespace nomatmul
