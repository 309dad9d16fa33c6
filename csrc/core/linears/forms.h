// What the forms of linears are made of; each has a file here.
#pragma once

#include <memory>
#include <string>

#include "core/linear.h"

namespace nomatmul {

struct LinearParts {
  const Description& description;
  std::string name, owner;  // the part whose tensors hold the weights: the embedding of a tied head
  const Isa& isa;
  Tensors& tensors;
  int outputs, inputs, halves;
};

// Tokens that one product takes: enough to pay for unpacking the weights, few enough for the
// prepared activations to stay in a core's cache.
constexpr int kTokenBlock = 256;
// Bytes of weights that a task of a decode step reads.
constexpr size_t kTaskBytes = 96 * 1024;

using MakeLinear = std::unique_ptr<LinearForm>(const LinearParts&);
MakeLinear make_ternary_linear, make_dense_linear, make_panel_linear, make_row_linear;

// Outputs of a task of a product that waits for its weights where tokens are few: a multiple of
// `step`, so that tasks are of equal size and some for every thread.
inline Cut cut_by_weights(size_t row_bytes, int step, int outputs, int matrices, int tokens,
                          int threads, int least) {
  int rows = static_cast<int>(kTaskBytes / (row_bytes * matrices)) / step * step;
  rows = std::min(rows, outputs / (4 * threads) / step * step);
  if (tokens > 1) rows = std::min(rows, 64);
  return {outputs, tokens, std::max(rows, least), kTokenBlock, true};
}

}  // namespace nomatmul
