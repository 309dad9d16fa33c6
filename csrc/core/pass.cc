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
  not_finite_.store(false, std::memory_order_relaxed);
}

void Pass::reserve(size_t floats, size_t bytes) {
  if (floats > floats_) {
    floats_ = (floats + 15) / 16 * 16;
    thread_floats_.need<float>(floats_ * threads);
  }
  if (bytes > bytes_) {
    bytes_ = (bytes + 63) / 64 * 64;
    thread_bytes_.need<uint8_t>(bytes_ * threads);
  }
}

void Pass::reserve(const Linear& linear, const Cut& cut, int matrices) {
  const size_t width = std::max(linear.inputs(), hidden);
  reserve(std::max(width, cut.tile() * matrices), linear.scratch_bytes(tokens));
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
  if (count > kFewTokens || !linear.ternary()) return;
  const int matrices = static_cast<int>(weights.size());
  const int step = linear.cut(outputs, matrices, count, threads).output_step;
  const void* bases[3] = {};
  std::copy(weights.begin(), weights.end(), bases);
  pool->hint(bases, matrices, step * linear.row_bytes(), outputs / step);
}

void Pass::feed(std::initializer_list<LinearInput*> inputs, int token, float* row, int thread) {
  (*inputs.begin())->linear->normalise(row);
  for (LinearInput* input : inputs) {
    if (!input->linear->feed(input, token, row, bytes(thread))) poison();
  }
}

void Pass::feed_values(LinearInput* input) {
  const int width = input->linear->inputs();
  if (!input->linear->feeds()) return;
  for_tokens(tokens, width, [&](int t, int thread) {
    feed({input}, t, input->values + static_cast<size_t>(t) * width, thread);
  });
}

void Pass::prepare(std::initializer_list<LinearInput*> inputs, int count, const char* where) {
  check_finite(where);
  const int blocks = (*inputs.begin())->linear->prepare_blocks(count);
  const int tasks = static_cast<int>(inputs.size()) * blocks;
  const auto task = [&](int index, int) {
    LinearInput* input = inputs.begin()[index / blocks];
    input->linear->prepare(input, index % blocks, count);
  };
  if (count < kPrepareTokens) {
    for (int index = 0; index < tasks; ++index) task(index, 0);
  } else {
    pool->run(tasks, task);
  }
}

void Pass::check_finite(const char* where) const {
  if (!not_finite_.load(std::memory_order_relaxed)) return;
  throw std::domain_error(
      std::string("the activations before the ") + where +
      (layer < 0 ? std::string() : " of layer " + std::to_string(layer)) +
      " are not finite (NaN or infinity): the model's weights are damaged or out of range");
}

void Pass::add_product(const LinearInput& input, float* to) {
  const int n = input.linear->outputs();
  if (to == nullptr) to = x.data<float>();
  const Cut cut = this->cut(*input.linear, n);
  for_tiles(cut, [&](int row, int rows, int first, int m, int thread) {
    float* out = floats(thread);
    tile(input, row, rows, first, m, out, rows, thread);
    for (int t = 0; t < m; ++t) {
      isa->ternary->add(to + static_cast<size_t>(first + t) * n + row, out + t * rows, rows);
    }
  });
}

}  // namespace nomatmul
