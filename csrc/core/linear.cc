#include "core/linear.h"

#include <cmath>
#include <cstring>

#include "core/whole_product.h"

namespace nomatmul {
namespace {

// Tokens that one ternary product takes: enough to pay for unpacking the weights, few enough for
// the prepared activations to stay in a core's cache.
constexpr int kTokenBlock = 256;
// Bytes of weights that a task of a decode step reads.
constexpr size_t kTaskBytes = 48 * 1024;
constexpr int kRowChunk = 132;    // tokens of one task of a dense product, at most: they fit an L2
constexpr int kRowStep = 12;      // a multiple of what every dense kernel takes at once
constexpr int kTasks = 32;        // of a product and thread: at its end one waits for half a task
constexpr int kMaxInt8 = 131072;  // inputs: 127 * 127 * this must not leave int32

int up(int value, int step) { return static_cast<int>(round_up(value, step)); }

}  // namespace

void Linear::declare(const Description& description, const std::string& name, const Isa& isa,
                     Tensors& tensors, int halves) {
  isa_ = &isa;
  halves_ = halves;
  outputs_ = description.whole("outputs", 1, kMaxElements);
  inputs_ = description.whole("inputs", 1, kMaxElements);
  const size_t count = static_cast<size_t>(outputs_) * inputs_;
  kind_ =
      choose<Kind>("linear", description.kind,
                   {{"ternary", Kind::kTernary}, {"int8", Kind::kInt8}, {"float", Kind::kFloat}});
  if (kind_ == Kind::kTernary) {
    packing_ = packing_of(description.word("packing"));
    norm_eps_ = static_cast<float>(description.number("norm_eps"));
    row_bytes_ = row_bytes_of(packing_, inputs_);
    tensors.add(name + ".packed", DType::kU8, row_bytes_ * outputs_, &packed_);
    tensors.add_copied(name + ".scale", DType::kF32, 1,
                       [this](const void* data) { std::memcpy(&scale_, data, sizeof scale_); });
    tensors.add_floats(name + ".norm.weight", inputs_, &norm_);
  } else if (kind_ == Kind::kInt8) {
    description.whole("inputs", 1, kMaxInt8);
    tensors.add_copied(name + ".weight", DType::kI8, count, [this](const void* data) {
      fill_panels<2, int8_t>([=](size_t at) { return static_cast<const int8_t*>(data)[at]; });
    });
    tensors.add_floats(name + ".scale", outputs_, &row_scale_);
  } else if (dtype_of_form(description.word("form")) == DType::kF32) {
    tensors.add_copied(name + ".weight", DType::kF32, count, [this](const void* data) {
      fill_panels<1, float>([=](size_t at) { return static_cast<const float*>(data)[at]; });
    });
  } else {
    tensors.add_copied(name + ".weight", DType::kBF16, count, [this](const void* data) {
      fill_panels<1, float>(
          [=](size_t at) { return float_of_bfloat16(static_cast<const uint16_t*>(data)[at]); });
    });
  }
}

// --- weights of int8 and float32 -------------------------------------------

size_t Linear::panel_bytes() const {
  return static_cast<size_t>(columns()) *
         (kind_ == Kind::kFloat ? inputs_ * sizeof(float) : static_cast<size_t>(up(inputs_, 2)));
}

// The panel that begins with an output; the second half begins with a panel of its own.
const uint8_t* Linear::panels_of(int row) const {
  const int half = outputs_ / halves_, panels = (half + columns() - 1) / columns();
  return panels_.as<uint8_t>() + (row / half * panels + row % half / columns()) * panel_bytes();
}

// value(output * inputs + input) of all weights; kTogether inputs of an output lie side by side.
template <int kTogether, class T, class Value>
void Linear::fill_panels(Value value) {
  const int half = outputs_ / halves_, wide = columns();
  panels_ = Block(static_cast<size_t>((half + wide - 1) / wide) * halves_ * panel_bytes());
  for (int j = 0; j < outputs_; ++j) {
    T* to = reinterpret_cast<T*>(const_cast<uint8_t*>(panels_of(j))) + j % half % wide * kTogether;
    const size_t at = static_cast<size_t>(j) * inputs_;
    for (size_t i = 0; i < static_cast<size_t>(inputs_); ++i) {
      to[i / kTogether * kTogether * wide + i % kTogether] = value(at + i);
    }
  }
}

// --- products --------------------------------------------------------------

Cut Linear::cut(int outputs, int matrices, int tokens, int threads) const {
  if (kind_ == Kind::kTernary) {
    // A multiple of 16 rows (one tile), so that tasks are of equal size and some for every thread.
    int rows = static_cast<int>(kTaskBytes / (row_bytes_ * matrices)) / 16 * 16;
    rows = std::min(rows, outputs / (4 * threads) / 16 * 16);
    if (tokens > 1) rows = std::min(rows, 64);
    return {outputs, tokens, std::max(rows, tokens > 4 ? 32 : 16), kTokenBlock, true};
  }
  const int least = std::max(1, (tokens + kRowChunk - 1) / kRowChunk);
  const int chunk = std::max(kRowStep, up((tokens + least - 1) / least, kRowStep));
  const int chunks = std::max(1, (tokens + chunk - 1) / chunk);
  const int panels = (outputs + columns() - 1) / columns();
  const int groups = std::min(panels, std::max(1, kTasks * threads / chunks));
  return {outputs, tokens, (panels + groups - 1) / groups * columns(), chunk, false};
}

size_t Linear::scratch_bytes(int tokens) const {
  if (kind_ == Kind::kFloat) return 0;
  if (kind_ == Kind::kInt8) return inputs_;
  return isa_->ternary->scratch_bytes(packing_, std::min(tokens, kTokenBlock), inputs_);
}

void Linear::expect(LinearInput* input, int tokens, float* values) const {
  const size_t count = static_cast<size_t>(tokens) * inputs_;
  input->linear = this;
  input->values = values;
  if (kind_ == Kind::kFloat) {
    if (values == nullptr) input->values = input->own.need<float>(count);
    return;
  }
  input->scale.need<float>(tokens);
  if (kind_ == Kind::kInt8) {
    input->q.need<int16_t>(static_cast<size_t>(up(inputs_, 2)) * tokens);
    return;
  }
  input->q.need<int8_t>(count);
  const int block = std::min(tokens, kTokenBlock);
  input->block_bytes = round_up(isa_->ternary->prepared_bytes(packing_, block, inputs_), 64);
  input->prepared.need<uint8_t>(input->block_bytes * prepare_blocks(tokens));
}

void Linear::normalise(float* x) const {
  if (kind_ == Kind::kTernary) isa_->ternary->normalise(x, norm_eps_, inputs_, x);
}

bool Linear::feed(LinearInput* input, int token, const float* x, uint8_t* scratch) const {
  if (kind_ == Kind::kFloat) return true;
  float* scale = input->scale.data<float>() + token;
  if (kind_ == Kind::kTernary) {
    int8_t* q = input->q.data<int8_t>() + static_cast<size_t>(token) * inputs_;
    const float step = isa_->ternary->scale_quantize(x, norm_, inputs_, q);
    *scale = scale_ * step;
    return std::isfinite(step);
  }
  auto* narrow = reinterpret_cast<int8_t*>(scratch);
  *scale = isa_->trees->quantise(x, inputs_, narrow);
  const int ld = up(inputs_, 2);
  int16_t* q = input->q.data<int16_t>() + static_cast<size_t>(token) * ld;
  std::copy(narrow, narrow + inputs_, q);
  if (ld > inputs_) q[inputs_] = 0;
  return std::isfinite(*scale);
}

int Linear::prepare_blocks(int tokens) const {
  return kind_ == Kind::kTernary ? (tokens + kTokenBlock - 1) / kTokenBlock : 0;
}

void Linear::prepare(LinearInput* input, int block, int tokens) const {
  const int first = block * kTokenBlock, m = std::min(kTokenBlock, tokens - first);
  isa_->ternary->prepare(packing_, input->q.data<int8_t>() + static_cast<size_t>(first) * inputs_,
                         m, inputs_, inputs_,
                         input->prepared.data<uint8_t>() + block * input->block_bytes);
}

void Linear::tile(const LinearInput& input, int row, int rows, int token, int tokens, float* out,
                  size_t ldo, uint8_t* scratch) const {
  const float* scale = input.scale.data<float>() + token;
  if (kind_ == Kind::kTernary) {
    const size_t block = token / kTokenBlock;
    isa_->ternary->product(packing_,
                           {this->row(row), row_bytes_, 0, rows, tokens, inputs_, scale, out, ldo,
                            input.prepared.data<uint8_t>() + block * input.block_bytes, scratch});
    return;
  }
  const int panels = (rows + columns() - 1) / columns();
  if (kind_ == Kind::kFloat) {
    isa_->dense->float_product(input.values + static_cast<size_t>(token) * inputs_, inputs_, tokens,
                               inputs_, reinterpret_cast<const float*>(panels_of(row)), 0, panels,
                               rows, out, ldo);
    return;
  }
  const size_t ld = up(inputs_, 2);
  isa_->dense->product(input.q.data<int16_t>() + token * ld, ld, tokens, inputs_,
                       reinterpret_cast<const int8_t*>(panels_of(row)), 0, panels, rows,
                       row_scale_ + row, scale, out, ldo);
}

void Linear::accumulate(const int8_t* q, int tokens, int32_t* acc) const {
  whole_product(
      *isa_->ternary, packing_, q,
      {packed_, row_bytes_, 0, outputs_, tokens, inputs_, nullptr, acc, size_t(outputs_)});
}

}  // namespace nomatmul
