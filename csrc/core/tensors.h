// A model's tensors by name: parts declare them, the caller points them at their bytes.
#pragma once

#include <cstddef>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "core/forms.h"
#include "core/memory.h"

namespace nomatmul {

class Tensors {
 public:
  // The bytes stay where the caller has them.
  template <class T>
  void add(const std::string& name, DType dtype, size_t count, const T** pointer) {
    slots_[name] = {dtype, count * width_of(dtype), true,
                    [pointer](const void* data) { *pointer = static_cast<const T*>(data); }};
    missing_.insert(name);
  }
  void add_floats(const std::string& name, size_t count, const float** pointer) {
    add(name, DType::kF32, count, pointer);
  }
  // take() copies the bytes into a form of its own.
  void add_copied(const std::string& name, DType dtype, size_t count,
                  std::function<void(const void*)> take);

  // Zeroed memory, aligned to 64 bytes, for what take() makes of tensors; it lives as long as this.
  // Small pieces share blocks, so that all of them lie in huge pages.
  uint8_t* room(size_t bytes);

  // Hands a tensor its bytes, from any thread; true where they must outlive the model. Throws
  // std::invalid_argument for an unknown name, a wrong dtype or a wrong size.
  bool set(const std::string& name, const void* data, size_t bytes, DType dtype);
  // Throws std::invalid_argument naming the tensors that are still missing.
  void check_complete() const;

 private:
  struct Slot {
    DType dtype;
    size_t bytes;
    bool kept;
    std::function<void(const void*)> take;
  };
  std::map<std::string, Slot> slots_;
  std::set<std::string> missing_;
  std::mutex mutex_;
  std::vector<Block> rooms_;
  size_t used_ = 0;  // of the last one
};

}  // namespace nomatmul
