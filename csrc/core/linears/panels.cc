// Causal models' linears whose scales belong to groups of inputs, ternary or int8, or to rows of
// int8. Activations are int8 with a step a group, or a token.
#include <cmath>

#include "core/linears/forms.h"
#include "core/linears/panel_weights.h"

namespace nomatmul {
namespace {

constexpr int kMaxInt8 = 131072;  // inputs of a scale: 127 * 127 * this must not leave int32

PanelShape shape_of(const LinearParts& parts) {
  const bool ternary = parts.description.kind == "ternary";
  int group = parts.description.whole("scale_group", 0, 256);
  const bool of_rows = group == 0;
  if (of_rows) group = parts.description.whole("inputs", 1, kMaxInt8);
  if (!of_rows && (group < 32 || (group & (group - 1)) != 0 || parts.inputs % group != 0)) {
    throw std::invalid_argument(parts.name + ": groups of " + std::to_string(group) +
                                " inputs are not 32, 64, 128 or 256 of them, or do not divide " +
                                std::to_string(parts.inputs));
  }
  const std::string scale = of_rows ? "f32" : parts.description.word("scale");
  const bool half = choose<bool>("scale", scale, {{"f16", true}, {"f32", false}});
  return {ternary ? PanelForm::kTernary : PanelForm::kInt8, parts.inputs, group, half};
}

PanelWeights weights_of(const LinearParts& parts) {
  const PanelShape shape = shape_of(parts);
  uint8_t* room = parts.tensors.room(PanelWeights::bytes(shape, parts.outputs, parts.halves));
  return {shape, parts.isa.panels->int8_bias, parts.outputs, parts.halves, room};
}

class Panels final : public LinearForm {
 public:
  explicit Panels(const LinearParts& parts)
      : isa_(parts.isa),
        weights_(weights_of(parts)),
        shape_(weights_.shape()),
        rounding_(shape_.group == shape_.k ? Rounding::kAway : Rounding::kEven) {
    const size_t count = static_cast<size_t>(parts.outputs) * shape_.groups();
    if (parts.description.number("scale_group") != 0) rounding_ = Rounding::kEven;
    if (shape_.form == PanelForm::kTernary) {
      const Packing packing = packing_of(parts.description.word("packing"));
      parts.tensors.add_copied(parts.owner + ".packed", DType::kU8,
                               row_bytes_of(packing, shape_.k) * parts.outputs,
                               [this, packing](const void* data) {
                                 weights_.fill_codes(packing, static_cast<const uint8_t*>(data));
                               });
    } else {
      parts.tensors.add_copied(
          parts.owner + ".weight", DType::kI8, static_cast<size_t>(parts.outputs) * shape_.k,
          [this](const void* data) { weights_.fill_int8(static_cast<const int8_t*>(data)); });
    }
    parts.tensors.add_copied(parts.owner + ".scale", shape_.half_scales ? DType::kF16 : DType::kF32,
                             count, [this](const void* data) { weights_.fill_scales(data); });
    normed_ = parts.description.numbers.count("norm_eps") != 0;
    if (!normed_) return;
    norm_eps_ = static_cast<float>(parts.description.number("norm_eps"));
    parts.tensors.add_floats(parts.name + ".norm.weight", shape_.k, &norm_);
  }

  bool exact() const override { return true; }

  std::string shared_input() const override {
    if (normed_) return {};
    return "panels " + std::to_string(static_cast<int>(shape_.form)) + " " +
           std::to_string(static_cast<int>(rounding_)) + " " + std::to_string(shape_.group) + " " +
           std::to_string(shape_.k);
  }

  Cut cut(int outputs, int matrices, int tokens, int threads) const override {
    return cut_by_weights(row_bytes(), kPanelRows, outputs, matrices, tokens, threads,
                          tokens > kPanelFewTokens ? 2 * kPanelRows : kPanelRows);
  }

  size_t scratch_bytes(int tokens) const override {
    return isa_.panels->scratch_bytes(shape_, std::min(tokens, kTokenBlock));
  }

  void expect(LinearInput* input, int tokens) const override {
    const int width = panel_width(tokens);
    input->scale.need<float>(static_cast<size_t>(tokens) * shape_.groups());
    input->q.need<int8_t>(static_cast<size_t>(tokens) * shape_.k);
    input->width = width;
    input->block_bytes = shape_.tile_bytes(width);
    input->prepared.need<uint8_t>(input->block_bytes * prepare_blocks(tokens));
  }

  void normalise(float* x) const override {
    if (normed_) isa_.ternary->normalise(x, norm_eps_, shape_.k, x);
  }

  bool feed(LinearInput* input, int token, const float* x, uint8_t*) const override {
    const int groups = shape_.groups();
    int8_t* q = input->q.data<int8_t>() + static_cast<size_t>(token) * shape_.k;
    float* step = input->scale.data<float>() + static_cast<size_t>(token) * groups;
    bool finite = true;
    for (int g = 0; g < groups; ++g) {
      const int at = g * shape_.group;
      step[g] = isa_.ternary->scale_quantize(x + at, normed_ ? norm_ + at : nullptr, rounding_,
                                             shape_.group, q + at);
      finite = finite && std::isfinite(step[g]);
    }
    return finite;
  }

  int prepare_blocks(int tokens) const override {
    const int width = panel_width(tokens);
    return (tokens + width - 1) / width;
  }

  void prepare(LinearInput* input, int block, int tokens) const override {
    const int width = input->width, first = block * width;
    isa_.panels->prepare(shape_, input->q.data<int8_t>() + static_cast<size_t>(first) * shape_.k,
                         input->scale.data<float>() + static_cast<size_t>(first) * shape_.groups(),
                         std::min(width, tokens - first), width,
                         input->prepared.data<uint8_t>() + block * input->block_bytes);
  }

  void tile(const LinearInput& input, int row, int rows, int token, int tokens, float* out,
            size_t ldo, uint8_t* scratch) const override {
    const uint8_t* tiles = input.prepared.data<uint8_t>() + token / input.width * input.block_bytes;
    isa_.panels->product(
        shape_, {weights_.panel_of(row), rows, tokens, input.width, tiles, out, ldo, scratch});
  }

  void values(int output, float* to) const override { weights_.values(output, to); }

  const uint8_t* row(int output) const override { return weights_.panel_of(output); }
  size_t row_bytes() const override { return shape_.bytes() / kPanelRows; }

 private:
  const Isa& isa_;
  PanelWeights weights_;
  PanelShape shape_;
  Rounding rounding_;
  bool normed_ = false;
  float norm_eps_ = 0;
  const float* norm_ = nullptr;
};

}  // namespace

std::unique_ptr<LinearForm> make_panel_linear(const LinearParts& parts) {
  return std::make_unique<Panels>(parts);
}

}  // namespace nomatmul
