// What the bindings share: array types, checks, and how a kernel's names are read.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "core/forms.h"
#include "core/shared_pool.h"

namespace nb = nanobind;
using nb::literals::operator""_a;

namespace nomatmul {

template <class T, int Dims>
using In = nb::ndarray<const T, nb::ndim<Dims>, nb::c_contig, nb::device::cpu>;
template <class T, int Dims>
using Out = nb::ndarray<T, nb::ndim<Dims>, nb::c_contig, nb::device::cpu>;

inline void require(bool good, const std::string& message) {
  if (!good) throw std::invalid_argument(message);
}

template <class Array>
auto pointer_of(const std::optional<Array>& array) {
  return array ? array->data() : nullptr;
}

// The name of an instruction set; none: the best one.
using IsaName = std::optional<std::string>;

inline const Isa& isa_of(const IsaName& name) {
  std::string error;
  const Isa* isa = name ? find_isa(name->c_str()) : best_isa(&error);
  if (isa != nullptr) return *isa;
  if (name) {
    error = "isa \"" + *name + "\" is not available here; available:";
    for (const std::string& one : available_isas()) error += " " + one;
  }
  throw std::invalid_argument(error);
}

// A length as int; kernels count no further than kMaxElements.
inline int checked_int(size_t value, const char* what) {
  require(value <= static_cast<size_t>(kMaxElements), std::string(what) + " is " +
                                                          std::to_string(value) + ", above " +
                                                          std::to_string(kMaxElements));
  return static_cast<int>(value);
}

inline int checked_threads(int threads) {
  require(threads >= 1 && threads <= 1024,
          "threads is " + std::to_string(threads) + ", expected 1 to 1024");
  return threads;
}

// An array of any type, and what it holds; numpy has no bfloat16: its bits come as uint16.
using Stored = nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu>;

inline DType dtype_of(const Stored& array) {
  using Code = nb::dlpack::dtype_code;
  const Code code = static_cast<Code>(array.dtype().code);
  const size_t size = array.itemsize();
  if (size == 1 && code == Code::UInt) return DType::kU8;
  if (size == 1 && code == Code::Int) return DType::kI8;
  if (size == 2 && code == Code::UInt) return DType::kBF16;
  if (size == 2 && code == Code::Float) return DType::kF16;
  if (size == 4 && code == Code::Float) return DType::kF32;
  throw std::invalid_argument(
      "tensors are uint8, int8, uint16 (bfloat16 bits), float16 or float32");
}

template <class T, class... Lengths>
nb::ndarray<nb::numpy, T> new_array(Lengths... lengths) {
  T* data = new T[(static_cast<size_t>(lengths) * ...)];  // whoever asked fills it
  nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<T*>(p); });
  return nb::ndarray<nb::numpy, T>(data, {static_cast<size_t>(lengths)...}, owner);
}

// work(pool, buffers) with a pool of so many threads, without the GIL.
template <class F>
void with_pool(int threads, F&& work) {
  checked_threads(threads);
  SharedPools& pools = SharedPools::get();
  nb::gil_scoped_release released;
  pools.with(threads, work);
}

// Each adds its classes and functions to the extension.
void bind_model(nb::module_& m);
void bind_layers(nb::module_& m);
void bind_linear(nb::module_& m);
void bind_pages(nb::module_& m);
void bind_kernels(nb::module_& m);
void bind_panels(nb::module_& m);  // after bind_kernels
void bind_tools(nb::module_& m);

}  // namespace nomatmul
