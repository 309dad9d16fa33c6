// The parts of a graph. A model is an embedding, blocks, a final norm and a head; a block is
// x += token_mixer(norm(x)); x += channel_mixer(norm(x)). Each mixer has a file in mixers/ or
// channels/ and a line in layers.cc.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "core/description.h"
#include "core/linear.h"
#include "core/pass.h"
#include "core/state.h"

namespace nomatmul {

// An RMS norm or a layer norm. In exact models the RMS norm has the same bits on every ISA.
class Norm {
 public:
  void declare(const Description& description, const std::string& name, const Isa& isa,
               Tensors& tensors);
  // y = norm of x; y is not x. False where it is not finite, as far as this kind finds out.
  bool apply(const float* x, float* y) const;

 private:
  const Isa* isa_ = nullptr;
  const float *weight_ = nullptr, *bias_ = nullptr;
  float eps_ = 0;
  int size_ = 0;
  bool exact_ = false;
};

// A token mixer or a channel mixer.
class Mixer {
 public:
  virtual ~Mixer() = default;
  // What a sequence leaves behind here; pass.state() is where the pieces lie, in this order.
  virtual std::vector<StatePiece> state() const { return {}; }
  // Rows of trees that a token visits; 0: none.
  virtual int active() const { return 0; }
  // Room for pass.tokens tokens.
  virtual void reserve(Pass& pass) const = 0;
  // pass.x += mixer(norm(pass.x))
  virtual void run(Pass& pass, const Norm& norm) const = 0;
  // The walk of trees alone: rows and logits [tokens, active] of x behind the norm.
  virtual void walk(Pass&, const float*, int, int32_t*, float*) const {}
};

// Makes the norm of x the input of linears that share it: pass.inputs, in their order. rows: those
// of x, `count` of them, or nullptr: all. `where` names the linears in an error, see Pass::prepare.
void feed_norm(Pass& pass, const Norm& norm, std::initializer_list<const Linear*> linears,
               const char* where, const int* rows = nullptr, int count = 0);

// What a mixer is made of: its description, the prefix of its tensors' names, and where it declares
// them and its linears.
struct MixerParts {
  const Description& description;
  std::string name;
  int hidden;
  const Isa& isa;
  Tensors& tensors;
  std::map<std::string, const Linear*>& linears;

  void declare(const char* linear, Linear* to, int halves = 1) const;
};

// By the description's kind. Throws std::invalid_argument for an unknown one.
std::unique_ptr<Mixer> make_mixer(const MixerParts& parts);

}  // namespace nomatmul
