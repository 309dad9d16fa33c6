// A linear layer: packed ternary rows behind a norm and an int8 quantiser, int8 rows behind a
// quantiser, or float32 rows. Mixers see one interface: they feed a chunk's tokens to it and ask
// for tiles of its outputs, so that what follows a product element by element is done in the same
// task, while its values are in cache.
//
// Ternary products have the same bits on every ISA, for any cut; int8 and float32 ones for any cut.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>

#include "core/description.h"
#include "core/memory.h"
#include "core/tensors.h"
#include "kernels/isa.h"

namespace nomatmul {

class Linear;

// The input of one linear for all tokens of a chunk. scale [T] is what a token's sums are
// multiplied by: its quantisation step and, of ternary linears, the scale of their tensor. A scale
// of each block of output rows would be applied in tile(), whose tiles then end where blocks do
// (cut()); a scale of each group of inputs makes this [T, groups], which feed() fills.
struct LinearInput {
  const Linear* linear = nullptr;
  float* values = nullptr;  // float32 [T, inputs]; nullptr: rows are quantised as they come
  Scratch own, q, prepared, scale;
  size_t block_bytes = 0;

  size_t bytes() const { return own.size() + q.size() + prepared.size() + scale.size(); }
};

// How a product over n outputs and some tokens is cut into tasks.
struct Cut {
  int outputs, tokens;
  int output_step, token_step;
  bool in_order;  // a task takes the outputs of all tokens, step by step from the first

  int output_tasks() const { return (outputs + output_step - 1) / output_step; }
  int token_tasks() const { return (tokens + token_step - 1) / token_step; }
  size_t tile() const { return static_cast<size_t>(output_step) * std::min(tokens, token_step); }
};

class Linear {
 public:
  Linear() = default;
  Linear(const Linear&) = delete;
  Linear& operator=(const Linear&) = delete;

  // Declares the tensors `name`.packed, .scale, .norm.weight ("ternary"), .weight ("float", in form
  // "f32" or "bf16") or .weight, .scale ("int8"). halves 2: tiles of the second half of the outputs
  // are asked for beside tiles of the first. The object must not move afterwards.
  void declare(const Description& description, const std::string& name, const Isa& isa,
               Tensors& tensors, int halves = 1);

  int outputs() const { return outputs_; }
  int inputs() const { return inputs_; }
  // Ternary: what stands between its products has the same bits on every ISA, too.
  bool ternary() const { return kind_ == Kind::kTernary; }

  Cut cut(int outputs, int matrices, int tokens, int threads) const;
  size_t scratch_bytes(int tokens) const;  // of one thread in tile() and feed()

  // values: rows of float32 that the caller fills ([tokens, inputs]), or nullptr: where this kind
  // needs them, at() gives a place for each.
  void expect(LinearInput* input, int tokens, float* values = nullptr) const;
  // The row divided by its root mean square, in place: linears of the same input share that.
  void normalise(float* x) const;
  // Takes one token, normalised. False where it is not finite.
  bool feed(LinearInput* input, int token, const float* x, uint8_t* scratch) const;
  bool feeds() const { return kind_ != Kind::kFloat; }
  int prepare_blocks(int tokens) const;
  void prepare(LinearInput* input, int block, int tokens) const;
  // out[t * ldo + r] of outputs row.. and tokens token.., a tile of cut().
  void tile(const LinearInput& input, int row, int rows, int token, int tokens, float* out,
            size_t ldo, uint8_t* scratch) const;

  // Exact sums of ternary rows for int8 q [tokens, inputs]: int32 [tokens, outputs].
  void accumulate(const int8_t* q, int tokens, int32_t* acc) const;

  // Where the weights of an output lie, and their bytes; nullptr where nobody waits for them.
  const uint8_t* row(int output) const { return packed_ + output * row_bytes_; }
  size_t row_bytes() const { return row_bytes_; }

 private:
  enum class Kind { kTernary, kInt8, kFloat };
  size_t panel_bytes() const;
  int columns() const { return isa_->dense->columns; }
  const uint8_t* panels_of(int row) const;
  template <int kTogether, class T, class Value>
  void fill_panels(Value value);

  Kind kind_ = Kind::kFloat;
  const Isa* isa_ = nullptr;
  int outputs_ = 0, inputs_ = 0, halves_ = 1;
  Packing packing_ = Packing::kTwoBit;
  float norm_eps_ = 0, scale_ = 0;
  size_t row_bytes_ = 0;
  const uint8_t* packed_ = nullptr;
  const float *norm_ = nullptr, *row_scale_ = nullptr;
  Block panels_;  // dense weights in the layout of kernels/dense.h, half after half
};

}  // namespace nomatmul
