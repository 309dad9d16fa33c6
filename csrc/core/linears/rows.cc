// Causal models' float linears: rows as they are stored, summed in one order on every ISA.
#include <cmath>

#include "core/linears/forms.h"

namespace nomatmul {
namespace {

class Rows final : public LinearForm {
 public:
  explicit Rows(const LinearParts& parts) : kernels_(*parts.isa.panels), inputs_(parts.inputs) {
    const DType dtype = dtype_of_form(parts.description.word("form"));
    form_ = dtype == DType::kF32   ? FloatForm::kF32
            : dtype == DType::kF16 ? FloatForm::kF16
                                   : FloatForm::kBF16;
    row_bytes_ = width_of(dtype) * inputs_;
    parts.tensors.add(parts.owner + ".weight", dtype, static_cast<size_t>(parts.outputs) * inputs_,
                      &weights_);
  }

  bool exact() const override { return true; }
  std::string shared_input() const override { return "rows " + std::to_string(inputs_); }

  Cut cut(int outputs, int matrices, int tokens, int threads) const override {
    return cut_by_weights(row_bytes_, kPanelRows, outputs, matrices, tokens, threads, kPanelRows);
  }

  void expect(LinearInput* input, int tokens) const override {
    if (input->values == nullptr) {
      input->values = input->own.need<float>(static_cast<size_t>(tokens) * inputs_);
    }
  }

  // Nothing to do but to look: a sum of zeros is not a zero where one of them is not finite.
  bool feed(LinearInput*, int, const float* x, uint8_t*) const override {
    float zero = 0;
    for (int i = 0; i < inputs_; ++i) zero += x[i] * 0.0f;
    return std::isfinite(zero);
  }

  void tile(const LinearInput& input, int row, int rows, int token, int tokens, float* out,
            size_t ldo, uint8_t*) const override {
    kernels_.float_product({form_, this->row(row), rows, tokens, inputs_,
                            input.values + static_cast<size_t>(token) * inputs_, out, ldo});
  }

  void values(int output, float* to) const override {
    const uint8_t* from = row(output);
    for (int i = 0; i < inputs_; ++i) {
      if (form_ == FloatForm::kF32) {
        std::memcpy(to + i, from + 4 * i, sizeof(float));
        continue;
      }
      uint16_t half;
      std::memcpy(&half, from + 2 * i, sizeof half);
      to[i] = form_ == FloatForm::kF16 ? float_of_half(half) : float_of_bfloat16(half);
    }
  }

  const uint8_t* row(int output) const override {
    return static_cast<const uint8_t*>(weights_) + output * row_bytes_;
  }
  size_t row_bytes() const override { return row_bytes_; }

 private:
  const PanelKernels& kernels_;
  int inputs_;
  FloatForm form_;
  size_t row_bytes_;
  const void* weights_ = nullptr;
};

}  // namespace

std::unique_ptr<LinearForm> make_row_linear(const LinearParts& parts) {
  return std::make_unique<Rows>(parts);
}

}  // namespace nomatmul
