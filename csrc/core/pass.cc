#include "core/pass.h"

#include <stdexcept>

namespace nomatmul {
namespace {

// Up to so many tokens a product waits for memory, not for arithmetic.
constexpr int kFewTokens = 16;
// From so many tokens on, preparing a product's input is worth a parallel region.
constexpr int kPrepareTokens = 16;

}  // namespace

void Pass::begin(int count) {
  tokens = count;
  x.need<float>(static_cast<size_t>(count) * hidden);
  if (token_state.size() < static_cast<size_t>(count)) token_state.resize(count);
  rotary.forget();
  not_finite_.store(false, std::memory_order_relaxed);
}

void Pass::reserve(size_t floats, size_t bytes) {
  const size_t most_floats = std::max(floats_, round_up(floats, 16));
  const size_t most_bytes = std::max(bytes_, round_up(bytes, 64));
  if (most_floats == floats_ && most_bytes == bytes_) return;
  floats_ = bytes_ = 0;  // until both are there: a buffer that cannot grow is gone
  thread_floats_.need<float>(most_floats * threads);
  thread_bytes_.need<uint8_t>(most_bytes * threads);
  floats_ = most_floats, bytes_ = most_bytes;
}

void Pass::reserve(const Linear& linear, int outputs, int matrices, int kept) {
  const size_t width = std::max(linear.inputs(), hidden);
  reserve(std::max(width, cut(linear, outputs, matrices).tile() * kept),
          linear.scratch_bytes(tokens));
}

size_t Pass::scratch_size() const {
  size_t bytes =
      x.size() + a.size() + b.size() + c.size() + thread_floats_.size() + thread_bytes_.size();
  for (const Scratch* part : {&trees.prepared, &trees.steps, &trees.sums, &trees.logits,
                              &trees.rows, &trees.order, &trees.keys, &trees.threads}) {
    bytes += part->size();
  }
  for (const LinearInput& input : inputs) bytes += input.bytes();
  return bytes;
}

void Pass::announce(const Linear& linear, std::initializer_list<const uint8_t*> weights,
                    int outputs, int count) {
  if (count > kFewTokens || linear.row(0) == nullptr) return;
  const int matrices = static_cast<int>(weights.size());
  const int step = linear.cut(outputs, matrices, count, threads).output_step;
  const void* bases[3] = {};
  std::copy(weights.begin(), weights.end(), bases);
  pool->hint(bases, matrices, step * linear.row_bytes(), outputs / step);
}

void Pass::expect(std::initializer_list<const Linear*> linears, int count) {
  int products = 0;
  for (const Linear* linear : linears) {
    LinearInput* input = &inputs[products];
    input->linear = linear, input->source = nullptr;
    for (int i = 0; i < products && input->source == nullptr; ++i) {
      if (inputs[i].source == nullptr && linear->shares(*inputs[i].linear)) {
        input->source = &inputs[i];
      }
    }
    if (input->source == nullptr) linear->expect(input, count);
    ++products;
  }
}

void Pass::feed(int products, int token, float* row, int thread) {
  inputs[0].linear->normalise(row);
  for (int i = 0; i < products; ++i) {
    if (inputs[i].source != nullptr) continue;
    if (!inputs[i].linear->feed(&inputs[i], token, row, bytes(thread))) poison();
  }
}

void Pass::prepare(int products, int count, const char* where) {
  check_finite(where);
  const int blocks = inputs[0].linear->prepare_blocks(count);
  const auto task = [&](int index, int) {
    LinearInput* input = &inputs[index / blocks];
    if (input->source == nullptr) input->linear->prepare(input, index % blocks, count);
  };
  if (count < kPrepareTokens) {
    for (int index = 0; index < products * blocks; ++index) task(index, 0);
  } else {
    pool->run(products * blocks, task);
  }
}

void Pass::feed_values(const Linear& linear, float* values, const char* where) {
  const int width = linear.inputs();
  linear.expect(&inputs[0], tokens, values);
  if (linear.feeds()) {
    for_tokens(tokens, width, [&](int t, int thread) {
      feed(1, t, values + static_cast<size_t>(t) * width, thread);
    });
  }
  prepare(1, tokens, where);
}

void Pass::check_finite(const char* where) const {
  if (!not_finite_.load(std::memory_order_relaxed)) return;
  throw std::domain_error(
      std::string("the activations before the ") + where +
      (layer < 0 ? std::string() : " of layer " + std::to_string(layer)) +
      " are not finite (NaN or infinity): the model's weights are damaged or out of range");
}

void Pass::product(int count, float* out) {
  const Linear& linear = *inputs[0].linear;
  const size_t n = linear.outputs();
  for_tiles(linear.cut(linear.outputs(), 1, count, threads),
            [&](int row, int rows, int first, int m, int thread) {
              tile(inputs[0], row, rows, first, m, out + first * n + row, n, thread);
            });
}

void Pass::add_product(float* to) {
  const int n = inputs[0].linear->outputs();
  for_tiles(cut(*inputs[0].linear, n), [&](int row, int rows, int first, int m, int thread) {
    float* out = floats(thread);
    tile(inputs[0], row, rows, first, m, out, rows, thread);
    for (int t = 0; t < m; ++t) {
      isa->ternary->add(to + static_cast<size_t>(first + t) * n + row, out + t * rows, rows);
    }
  });
}

void Pass::add_linear(const Linear& linear, float* values, const char* where, float* to) {
  announce(linear, {linear.row(0)}, linear.outputs(), tokens);
  feed_values(linear, values, where);
  add_product(to);
}

}  // namespace nomatmul
