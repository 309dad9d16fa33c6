// Encoders' linears: int8 rows behind a quantiser, or float32 rows, in panels (kernels/dense.h).
#include <cmath>

#include "core/linears/forms.h"

namespace nomatmul {
namespace {

constexpr int kRowChunk = 132;    // tokens of one task of a dense product, at most: they fit an L2
constexpr int kRowStep = 12;      // a multiple of what every dense kernel takes at once
constexpr int kTasks = 32;        // of a product and thread: at its end one waits for half a task
constexpr int kMaxInt8 = 131072;  // inputs: 127 * 127 * this must not leave int32

int up(int value, int step) { return static_cast<int>(round_up(value, step)); }

class Dense final : public LinearForm {
 public:
  explicit Dense(const LinearParts& parts)
      : isa_(parts.isa),
        int8_(parts.description.kind == "int8"),
        outputs_(parts.outputs),
        inputs_(parts.inputs),
        halves_(parts.halves) {
    const std::string name = parts.name + ".weight";
    const size_t count = static_cast<size_t>(outputs_) * inputs_;
    if (int8_) {
      parts.description.whole("inputs", 1, kMaxInt8);
      parts.tensors.add_copied(name, DType::kI8, count, [this](const void* data) {
        fill<2, int8_t>([=](size_t at) { return static_cast<const int8_t*>(data)[at]; });
      });
      parts.tensors.add_floats(parts.name + ".scale", outputs_, &row_scale_);
    } else if (parts.description.word("form") == "f32") {
      parts.tensors.add_copied(name, DType::kF32, count, [this](const void* data) {
        fill<1, float>([=](size_t at) { return static_cast<const float*>(data)[at]; });
      });
    } else {
      parts.tensors.add_copied(name, DType::kBF16, count, [this](const void* data) {
        fill<1, float>(
            [=](size_t at) { return float_of_bfloat16(static_cast<const uint16_t*>(data)[at]); });
      });
    }
  }

  bool exact() const override { return false; }

  Cut cut(int outputs, int, int tokens, int threads) const override {
    const int least = std::max(1, (tokens + kRowChunk - 1) / kRowChunk);
    const int chunk = std::max(kRowStep, up((tokens + least - 1) / least, kRowStep));
    const int chunks = std::max(1, (tokens + chunk - 1) / chunk);
    const int panels = (outputs + columns() - 1) / columns();
    const int groups = std::min(panels, std::max(1, kTasks * threads / chunks));
    return {outputs, tokens, (panels + groups - 1) / groups * columns(), chunk, false};
  }

  size_t scratch_bytes(int) const override { return int8_ ? inputs_ : 0; }

  void expect(LinearInput* input, int tokens) const override {
    if (!int8_) {
      if (input->values == nullptr) {
        input->values = input->own.need<float>(static_cast<size_t>(tokens) * inputs_);
      }
      return;
    }
    input->scale.need<float>(tokens);
    input->q.need<int16_t>(static_cast<size_t>(up(inputs_, 2)) * tokens);
  }

  bool feeds() const override { return int8_; }

  bool feed(LinearInput* input, int token, const float* x, uint8_t* scratch) const override {
    if (!int8_) return true;
    auto* narrow = reinterpret_cast<int8_t*>(scratch);
    float* scale = input->scale.data<float>() + token;
    *scale = isa_.trees->quantise(x, inputs_, narrow);
    const int ld = up(inputs_, 2);
    int16_t* q = input->q.data<int16_t>() + static_cast<size_t>(token) * ld;
    std::copy(narrow, narrow + inputs_, q);
    if (ld > inputs_) q[inputs_] = 0;
    return std::isfinite(*scale);
  }

  void tile(const LinearInput& input, int row, int rows, int token, int tokens, float* out,
            size_t ldo, uint8_t*) const override {
    const int panels = (rows + columns() - 1) / columns();
    if (!int8_) {
      isa_.dense->float_product(input.values + static_cast<size_t>(token) * inputs_, inputs_,
                                tokens, inputs_, reinterpret_cast<const float*>(panels_of(row)), 0,
                                panels, rows, out, ldo);
      return;
    }
    const size_t ld = up(inputs_, 2);
    isa_.dense->product(input.q.data<int16_t>() + token * ld, ld, tokens, inputs_,
                        reinterpret_cast<const int8_t*>(panels_of(row)), 0, panels, rows,
                        row_scale_ + row, input.scale.data<float>() + token, out, ldo);
  }

 private:
  int columns() const { return isa_.dense->columns; }
  size_t panel_bytes() const {
    return static_cast<size_t>(columns()) *
           (int8_ ? static_cast<size_t>(up(inputs_, 2)) : inputs_ * sizeof(float));
  }

  // The panel that begins with an output; the second half begins with a panel of its own.
  const uint8_t* panels_of(int row) const {
    const int half = outputs_ / halves_, panels = (half + columns() - 1) / columns();
    return panels_.as<uint8_t>() + (row / half * panels + row % half / columns()) * panel_bytes();
  }

  // value(output * inputs + input) of all weights; kTogether inputs of an output lie side by side.
  template <int kTogether, class T, class Value>
  void fill(Value value) {
    const int half = outputs_ / halves_, wide = columns();
    panels_ = Block(static_cast<size_t>((half + wide - 1) / wide) * halves_ * panel_bytes());
    for (int j = 0; j < outputs_; ++j) {
      T* to =
          reinterpret_cast<T*>(const_cast<uint8_t*>(panels_of(j))) + j % half % wide * kTogether;
      const size_t at = static_cast<size_t>(j) * inputs_;
      for (size_t i = 0; i < static_cast<size_t>(inputs_); ++i) {
        to[i / kTogether * kTogether * wide + i % kTogether] = value(at + i);
      }
    }
  }

  const Isa& isa_;
  bool int8_;
  int outputs_, inputs_, halves_;
  const float* row_scale_ = nullptr;
  Block panels_;  // half after half
};

}  // namespace

std::unique_ptr<LinearForm> make_dense_linear(const LinearParts& parts) {
  return std::make_unique<Dense>(parts);
}

}  // namespace nomatmul
