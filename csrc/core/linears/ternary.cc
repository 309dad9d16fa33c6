// Packed ternary rows behind an int8 quantiser of whole tokens, with or without a norm in front of
// it; one scale for the matrix, or for each block of rows.
#include <cmath>

#include "core/linears/forms.h"
#include "core/whole_product.h"

namespace nomatmul {
namespace {

class Ternary final : public LinearForm {
 public:
  explicit Ternary(const LinearParts& parts)
      : kernels_(*parts.isa.ternary),
        packing_(packing_of(parts.description.word("packing"))),
        rounding_(rounding_of(parts.description.word("rounding"))),
        outputs_(parts.outputs),
        inputs_(parts.inputs),
        row_bytes_(row_bytes_of(packing_, inputs_)) {
    const int rows = parts.description.whole("scale_rows", 0, outputs_);
    block_ = rows == 0 ? outputs_ : rows;
    if (outputs_ % block_ != 0) {
      throw std::invalid_argument(parts.name + ": blocks of " + std::to_string(block_) +
                                  " rows do not divide its " + std::to_string(outputs_));
    }
    parts.tensors.add(parts.name + ".packed", DType::kU8, row_bytes_ * outputs_, &packed_);
    parts.tensors.add_floats(parts.name + ".scale", outputs_ / block_, &scale_);
    normed_ = parts.description.numbers.count("norm_eps") != 0;
    if (!normed_) return;
    norm_eps_ = static_cast<float>(parts.description.number("norm_eps"));
    parts.tensors.add_floats(parts.name + ".norm.weight", inputs_, &norm_);
  }

  bool exact() const override { return true; }

  std::string shared_input() const override {
    if (normed_) return {};
    return "ternary " + std::to_string(static_cast<int>(packing_)) + " " +
           std::to_string(static_cast<int>(rounding_)) + " " + std::to_string(inputs_);
  }

  Cut cut(int outputs, int matrices, int tokens, int threads) const override {
    const int step = tokens > 4 ? 32 : 16;  // rows of the largest tile
    return cut_by_weights(row_bytes_, step, outputs, matrices, tokens, threads, step);
  }

  size_t scratch_bytes(int tokens) const override {
    return kScaleBytes + kernels_.scratch_bytes(packing_, std::min(tokens, kTokenBlock), inputs_);
  }

  void expect(LinearInput* input, int tokens) const override {
    input->scale.need<float>(tokens);
    input->q.need<int8_t>(static_cast<size_t>(tokens) * inputs_);
    const int block = std::min(tokens, kTokenBlock);
    input->block_bytes = round_up(kernels_.prepared_bytes(packing_, block, inputs_), 64);
    input->prepared.need<uint8_t>(input->block_bytes * prepare_blocks(tokens));
  }

  void normalise(float* x) const override {
    if (normed_) kernels_.normalise(x, norm_eps_, inputs_, x);
  }

  bool feed(LinearInput* input, int token, const float* x, uint8_t*) const override {
    int8_t* q = input->q.data<int8_t>() + static_cast<size_t>(token) * inputs_;
    const float step = kernels_.scale_quantize(x, norm_, rounding_, inputs_, q);
    input->scale.data<float>()[token] = step;
    return std::isfinite(step);
  }

  int prepare_blocks(int tokens) const override { return (tokens + kTokenBlock - 1) / kTokenBlock; }

  void prepare(LinearInput* input, int block, int tokens) const override {
    const int first = block * kTokenBlock, m = std::min(kTokenBlock, tokens - first);
    kernels_.prepare(packing_, input->q.data<int8_t>() + static_cast<size_t>(first) * inputs_, m,
                     inputs_, inputs_,
                     input->prepared.data<uint8_t>() + block * input->block_bytes);
  }

  // In pieces that end where blocks of scales do.
  void tile(const LinearInput& input, int row, int rows, int token, int tokens, float* out,
            size_t ldo, uint8_t* scratch) const override {
    const uint8_t* prepared =
        input.prepared.data<uint8_t>() + token / kTokenBlock * input.block_bytes;
    const float* step = input.scale.data<float>() + token;
    auto* scale = reinterpret_cast<float*>(scratch);
    for (int done = 0; done < rows;) {
      const int from = row + done, block = from / block_;
      const int count = std::min(rows - done, (block + 1) * block_ - from);
      for (int t = 0; t < tokens; ++t) scale[t] = scale_[block] * step[t];
      kernels_.product(packing_, {this->row(from), row_bytes_, 0, count, tokens, inputs_, scale,
                                  out + done, ldo, prepared, scratch + kScaleBytes});
      done += count;
    }
  }

  void accumulate(const int8_t* q, int tokens, int32_t* acc) const override {
    whole_product(
        kernels_, packing_, q,
        {packed_, row_bytes_, 0, outputs_, tokens, inputs_, nullptr, acc, size_t(outputs_)});
  }

  const uint8_t* row(int output) const override { return packed_ + output * row_bytes_; }
  size_t row_bytes() const override { return row_bytes_; }

 private:
  static constexpr size_t kScaleBytes = kTokenBlock * sizeof(float);

  const TernaryKernels& kernels_;
  Packing packing_;
  Rounding rounding_;
  int outputs_, inputs_, block_ = 0;
  size_t row_bytes_;
  bool normed_ = false;
  float norm_eps_ = 0;
  const uint8_t* packed_ = nullptr;
  const float *scale_ = nullptr, *norm_ = nullptr;
};

}  // namespace

std::unique_ptr<LinearForm> make_ternary_linear(const LinearParts& parts) {
  return std::make_unique<Ternary>(parts);
}

}  // namespace nomatmul
