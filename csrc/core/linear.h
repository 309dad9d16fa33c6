// A linear layer: y = x W^T in whatever form its weights are stored. Mixers see one interface: they
// feed a chunk's tokens to it and ask for tiles of its outputs, so that what follows a product
// element by element is done in the same task, while its values are in cache. The forms are in
// linears/.
//
// Products of exact linears (all those of causal models) have the same bits on every ISA, for any
// cut; those of encoders' int8 and float32 ones for any cut.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "core/description.h"
#include "core/memory.h"
#include "core/tensors.h"
#include "kernels/isa.h"

namespace nomatmul {

class Linear;

// The input of one linear for all tokens of a chunk. Linears with the same quantiser and no norm
// inside share one: theirs is `source`, and their own stays empty. scale: what a token's sums are
// multiplied by beside the scales of the weights, its quantisation steps: [T], or [T, groups].
struct LinearInput {
  const Linear* linear = nullptr;
  const LinearInput* source = nullptr;
  float* values = nullptr;  // float32 [T, inputs]; nullptr: rows are quantised as they come
  Scratch own, q, prepared, scale;
  size_t block_bytes = 0;
  int width = 0;  // tokens of a prepared block

  const LinearInput& fed() const { return source == nullptr ? *this : *source; }
  size_t bytes() const { return own.size() + q.size() + prepared.size() + scale.size(); }
};

// How a product over n outputs and some tokens is cut into tasks.
struct Cut {
  int outputs, tokens;
  int output_step, token_step;
  bool in_order;  // a task takes the outputs of all tokens, step by step from the first

  int output_tasks() const { return (outputs + output_step - 1) / output_step; }
  int token_tasks() const { return (tokens + token_step - 1) / token_step; }
  int tasks() const { return output_tasks() * (in_order ? 1 : token_tasks()); }
  size_t tile() const { return static_cast<size_t>(output_step) * std::min(tokens, token_step); }
};

// The weights of a linear in one form, and its products; Linear says what the functions do.
class LinearForm {
 public:
  virtual ~LinearForm() = default;
  virtual bool exact() const = 0;
  // Linears of equal words take one input; empty: this one shares with none.
  virtual std::string shared_input() const { return {}; }
  virtual Cut cut(int outputs, int matrices, int tokens, int threads) const = 0;
  virtual size_t scratch_bytes(int) const { return 0; }
  virtual void expect(LinearInput* input, int tokens) const = 0;
  virtual void normalise(float*) const {}
  virtual bool feeds() const { return true; }
  virtual bool feed(LinearInput*, int, const float*, uint8_t*) const { return true; }
  virtual int prepare_blocks(int) const { return 0; }
  virtual void prepare(LinearInput*, int, int) const {}
  virtual void tile(const LinearInput& input, int row, int rows, int token, int tokens, float* out,
                    size_t ldo, uint8_t* scratch) const = 0;
  virtual void accumulate(const int8_t*, int, int32_t*) const {}
  virtual void values(int, float*) const {}
  virtual const uint8_t* row(int) const { return nullptr; }
  virtual size_t row_bytes() const { return 0; }
};

class Linear {
 public:
  Linear() = default;
  Linear(const Linear&) = delete;
  Linear& operator=(const Linear&) = delete;

  // Declares the tensors of `name` that its form has. halves 2: tiles of the second half of the
  // outputs are asked for beside tiles of the first. The object must not move afterwards.
  void declare(const Description& description, const std::string& name, const Isa& isa,
               Tensors& tensors, int halves = 1);

  int outputs() const { return outputs_; }
  int inputs() const { return inputs_; }
  // What stands between its products has the same bits on every ISA, too.
  bool exact() const { return form_->exact(); }
  // Ternary rows behind an int8 quantiser of whole tokens: accumulate() serves them.
  bool ternary() const { return ternary_; }

  Cut cut(int outputs, int matrices, int tokens, int threads) const {
    return form_->cut(outputs, matrices, tokens, threads);
  }
  // Of one thread in tile() and feed().
  size_t scratch_bytes(int tokens) const { return form_->scratch_bytes(tokens); }

  bool shares(const Linear& other) const {
    return !shared_input_.empty() && shared_input_ == other.shared_input_;
  }
  // values: rows of float32 that the caller fills ([tokens, inputs]), or nullptr: where this kind
  // needs them, at() gives a place for each.
  void expect(LinearInput* input, int tokens, float* values = nullptr) const {
    input->linear = this, input->source = nullptr, input->values = values;
    form_->expect(input, tokens);
  }
  // The row divided by its root mean square, in place, where the linear has a norm inside: linears
  // of the same input share that.
  void normalise(float* x) const { form_->normalise(x); }
  // Takes one token, normalised. False where it is not finite.
  bool feed(LinearInput* input, int token, const float* x, uint8_t* scratch) const {
    return form_->feed(input, token, x, scratch);
  }
  bool feeds() const { return form_->feeds(); }
  int prepare_blocks(int tokens) const { return form_->prepare_blocks(tokens); }
  void prepare(LinearInput* input, int block, int tokens) const {
    form_->prepare(input, block, tokens);
  }
  // out[t * ldo + r] of outputs row.. and tokens token.., a tile of cut().
  void tile(const LinearInput& input, int row, int rows, int token, int tokens, float* out,
            size_t ldo, uint8_t* scratch) const {
    form_->tile(input, row, rows, token, tokens, out, ldo, scratch);
  }

  // Exact sums of ternary rows for int8 q [tokens, inputs]: int32 [tokens, outputs].
  void accumulate(const int8_t* q, int tokens, int32_t* acc) const {
    form_->accumulate(q, tokens, acc);
  }
  // The weights [inputs] of an output, of a head that is the embedding too.
  void values(int output, float* to) const { form_->values(output, to); }

  // Where the weights of an output lie, and their bytes; nullptr where nobody waits for them.
  const uint8_t* row(int output) const { return form_->row(output); }
  size_t row_bytes() const { return form_->row_bytes(); }

 private:
  std::unique_ptr<LinearForm> form_;
  std::string shared_input_;
  int outputs_ = 0, inputs_ = 0;
  bool ternary_ = false;
};

}  // namespace nomatmul
