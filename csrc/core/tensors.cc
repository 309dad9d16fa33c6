#include "core/tensors.h"

#include <cstdint>
#include <stdexcept>
#include <utility>

namespace nomatmul {

size_t width_of(DType dtype) { return dtype == DType::kF32 ? 4 : dtype == DType::kBF16 ? 2 : 1; }

DType dtype_of_form(const std::string& form) {
  if (form == "int8") return DType::kI8;
  if (form == "bf16") return DType::kBF16;
  if (form == "f32") return DType::kF32;
  throw std::invalid_argument("form must be \"int8\", \"bf16\" or \"f32\", got \"" + form + "\"");
}

void Tensors::add_copied(const std::string& name, DType dtype, size_t count,
                         std::function<void(const void*)> take) {
  slots_[name] = {dtype, count * width_of(dtype), false, std::move(take)};
  missing_.insert(name);
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
  missing_.erase(name);
  return slot.kept;
}

void Tensors::check_complete() const {
  if (missing_.empty()) return;
  throw std::invalid_argument(std::to_string(missing_.size()) + " tensors are missing, " +
                              *missing_.begin() + " among them");
}

}  // namespace nomatmul
