// The words for packings, forms and activations that a caller describes a model with.
#pragma once

#include <cstring>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <utility>

#include "kernels/common/half.h"
#include "kernels/isa.h"

namespace nomatmul {

// The value of a word. Throws std::invalid_argument, listing the known ones, for any other.
template <class T>
T choose(const char* what, const std::string& word,
         std::initializer_list<std::pair<const char*, T>> known) {
  std::string list;
  for (const auto& [name, value] : known) {
    if (word == name) return value;
    const bool last = name == (known.end() - 1)->first;
    list += std::string(list.empty() ? "" : last ? " or " : ", ") + name;
  }
  throw std::invalid_argument(std::string(what) + " \"" + word + "\" is unknown: " + list);
}

inline float float_of_bfloat16(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

enum class DType { kU8, kI8, kF16, kBF16, kF32 };

inline size_t width_of(DType dtype) {
  return dtype == DType::kF32 ? 4 : dtype == DType::kBF16 || dtype == DType::kF16 ? 2 : 1;
}

inline DType dtype_of_form(const std::string& form) {
  return choose<DType>(
      "form", form,
      {{"int8", DType::kI8}, {"f16", DType::kF16}, {"bf16", DType::kBF16}, {"f32", DType::kF32}});
}

inline KvForm kv_form_of(const std::string& word) {
  return choose<KvForm>("kv", word,
                        {{"f16", KvForm::kHalf}, {"int8", KvForm::kInt8}, {"f32", KvForm::kFloat}});
}

inline FffForm fff_form_of(const std::string& form) {
  return choose<FffForm>("form", form,
                         {{"f32", FffForm::kF32},
                          {"bf16", FffForm::kBF16},
                          {"int8", FffForm::kInt8},
                          {"ternary", FffForm::kTernary}});
}

inline Packing packing_of(const std::string& name) {
  return choose<Packing>("packing", name,
                         {{"2bit", Packing::kTwoBit}, {"1.6bit", Packing::kBase3}});
}

inline Activation activation_of(const std::string& name) {
  return choose<Activation>("activation", name,
                            {{"gelu", Activation::kGelu},
                             {"silu", Activation::kSilu},
                             {"relu", Activation::kRelu},
                             {"relu2", Activation::kRelu2}});
}

inline Rounding rounding_of(const std::string& name) {
  return choose<Rounding>(
      "rounding", name,
      {{"away", Rounding::kAway}, {"even", Rounding::kEven}, {"up", Rounding::kUp}});
}

}  // namespace nomatmul
