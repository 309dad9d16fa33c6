// The blocks and the head. Each ternary linear is one parallel region over rows; what follows a
// product element by element (gates, recurrence, residual) is done in the same task while its
// values are in cache, so a layer has four regions and no pass of its own over the activations.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "core/model.h"

namespace nomatmul {
namespace {

// Tokens that one call of product() takes: enough to pay for unpacking the weights, few enough
// for the prepared activations to stay in a core's cache.
constexpr int kTokenBlock = 256;
// Bytes of weights that a task of a decode step reads.
constexpr size_t kTaskBytes = 48 * 1024;
// Up to so many tokens a product waits for memory, not for arithmetic.
constexpr int kFewTokens = 16;

int blocks_of(int tokens) { return (tokens + kTokenBlock - 1) / kTokenBlock; }

}  // namespace

void Model::begin(int tokens) {
  const size_t T = tokens, D = spec_.hidden, M = spec_.intermediate;
  const int block = std::min(tokens, kTokenBlock);
  x_.need<float>(T * D);
  g_.need<float>(T * D);
  h_.need<float>(T * D);
  y_.need<float>(T * std::max(M, size_t{1}));
  if (token_state_.size() < T) token_state_.resize(T);
  // Rows of two results side by side (i and f, gate and up), or one row of activations.
  const Layer& layer = layers_[0];
  const int rows = std::max({rows_per_task(spec_.hidden, layer.i.row_bytes, 3, tokens),
                             rows_per_task(spec_.hidden, layer.o.row_bytes, 1, tokens),
                             rows_per_task(spec_.intermediate, layer.i.row_bytes, 2, tokens)});
  floats_ = std::max<size_t>(D, static_cast<size_t>(2) * block * rows);
  floats_ = (floats_ + 15) / 16 * 16;
  thread_floats_.need<float>(floats_ * threads_);
  product_bytes_ = 0;
  for (const int k : {spec_.hidden, std::max(1, spec_.intermediate)}) {
    product_bytes_ = std::max(product_bytes_, kernels_->scratch_bytes(spec_.packing, block, k));
  }
  product_bytes_ = (product_bytes_ + 63) / 64 * 64;
  thread_bytes_.need<uint8_t>(product_bytes_ * threads_);
  not_finite_.store(false, std::memory_order_relaxed);
}

// A multiple of 16 rows (one tile), so that tasks are of equal size and some for every thread.
int Model::rows_per_task(int n, size_t row_bytes, int matrices, int tokens) const {
  int rows = static_cast<int>(kTaskBytes / (row_bytes * matrices)) / 16 * 16;
  rows = std::min(rows, n / (4 * threads_) / 16 * 16);
  if (tokens > 1) rows = std::min(rows, 64);
  return std::max(rows, tokens > 4 ? 32 : 16);
}

// While this thread does the float steps before a product, the others may fetch its first weights.
void Model::announce(std::initializer_list<const uint8_t*> weights, size_t row_bytes, int n,
                     int tokens) {
  if (tokens > kFewTokens) return;
  const int matrices = static_cast<int>(weights.size());
  const int step = rows_per_task(n, row_bytes, matrices, tokens);
  const void* bases[3] = {};
  std::copy(weights.begin(), weights.end(), bases);
  pool_->hint(bases, matrices, step * row_bytes, n / step);
}

void Model::expect(Input* input, const Ternary& linear, int tokens) {
  input->linear = &linear;
  input->q.need<int8_t>(static_cast<size_t>(tokens) * linear.k);
  input->scale.need<float>(tokens);
  const int block = std::min(tokens, kTokenBlock);
  input->block_bytes = (kernels_->prepared_bytes(spec_.packing, block, linear.k) + 63) / 64 * 64;
  input->prepared.need<uint8_t>(input->block_bytes * blocks_of(tokens));
}

// x: the row divided by its root mean square, which linears of the same input share.
void Model::quantise(Input* input, int token, const float* x) {
  const Ternary& linear = *input->linear;
  const float step = kernels_->scale_quantize(
      x, linear.norm, linear.k, input->q.need<int8_t>(0) + static_cast<size_t>(token) * linear.k);
  if (!std::isfinite(step)) not_finite_.store(true, std::memory_order_relaxed);
  input->scale.need<float>(0)[token] = linear.scale * step;
}

void Model::check_finite(const char* where, int layer) const {
  if (!not_finite_.load(std::memory_order_relaxed)) return;
  throw std::domain_error(
      std::string("the activations before the ") + where +
      (layer < 0 ? std::string() : " of layer " + std::to_string(layer)) +
      " are not finite (NaN or infinity): the model's weights are damaged or out of range");
}

void Model::prepare(Input* const* inputs, int count, int tokens, const char* where, int layer) {
  check_finite(where, layer);
  const int blocks = blocks_of(tokens);
  const auto task = [&](int index, int) {
    Input& input = *inputs[index / blocks];
    const int block = index % blocks, k = input.linear->k;
    const int first = block * kTokenBlock, m = std::min(kTokenBlock, tokens - first);
    kernels_->prepare(spec_.packing, input.q.need<int8_t>(0) + static_cast<size_t>(first) * k, m, k,
                      k, input.prepared.need<uint8_t>(0) + block * input.block_bytes);
  };
  if (tokens < 16) {
    for (int index = 0; index < count * blocks; ++index) task(index, 0);
  } else {
    pool_->run(count * blocks, task);
  }
}

// Rows row.. of the linear for tokens token.. (one token block): out[t * ldo + r], both from 0.
void Model::product(const Input& input, int row, int rows, int token, int tokens, float* out,
                    size_t ldo, int thread) {
  const Ternary& linear = *input.linear;
  const size_t block = token / kTokenBlock;
  Input& mutable_input = const_cast<Input&>(input);
  kernels_->product(spec_.packing, linear.w + row * linear.row_bytes, linear.row_bytes, 0, rows,
                    mutable_input.prepared.need<uint8_t>(0) + block * input.block_bytes, tokens,
                    linear.k, mutable_input.scale.need<float>(0) + token, out, ldo,
                    thread_bytes_.need<uint8_t>(0) + thread * product_bytes_);
}

void Model::run_layer(int layer, int tokens) {
  mixer(layer, tokens);
  if (spec_.intermediate != 0) channel(layer, tokens);
  if (spec_.trees != 0) trees(layer, tokens);
}

void Model::mixer(int l, int tokens) {
  const Layer& layer = layers_[l];
  const int D = spec_.hidden;
  float *x = x_.need<float>(0), *g = g_.need<float>(0), *h = h_.need<float>(0);
  Input *i_in = &inputs_[0], *f_in = &inputs_[1], *g_in = &inputs_[2];
  announce({layer.i.w, layer.f.w, layer.g.w}, layer.i.row_bytes, D, tokens);
  expect(i_in, layer.i, tokens);
  expect(f_in, layer.f, tokens);
  expect(g_in, layer.g, tokens);
  for_tokens(tokens, 3 * D, [&](int t, int thread) {
    float* normed = thread_floats(thread);
    kernels_->rms_norm(x + static_cast<size_t>(t) * D, layer.mixer_norm, spec_.norm_eps, D, normed);
    kernels_->normalise(normed, spec_.linear_norm_eps, D, normed);
    for (Input* input : {i_in, f_in, g_in}) quantise(input, t, normed);
  });
  Input* const three[] = {i_in, f_in, g_in};
  prepare(three, 3, tokens, "token mixer", l);

  // i, f, g for some rows and all tokens, then the recurrence of those rows through time.
  const int step = rows_per_task(D, layer.i.row_bytes, 3, tokens);
  pool_->run((D + step - 1) / step, [&](int task, int thread) {
    const int row = task * step, rows = std::min(step, D - row);
    float* i = thread_floats(thread);
    for (int first = 0; first < tokens; first += kTokenBlock) {
      const int m = std::min(kTokenBlock, tokens - first);
      float* f = i + static_cast<size_t>(m) * rows;
      product(*i_in, row, rows, first, m, i, rows, thread);
      product(*f_in, row, rows, first, m, f, rows, thread);
      product(*g_in, row, rows, first, m, g + static_cast<size_t>(first) * D + row, D, thread);
      for (int t = 0; t < m; ++t) {
        float* state = token_state_[first + t] + static_cast<size_t>(l) * D + row;
        kernels_->mlgru_step(i + t * rows, f + t * rows, layer.lower_bound + row, 1.0f, rows,
                             state);
        std::memcpy(h + static_cast<size_t>(first + t) * D + row, state, rows * sizeof(float));
      }
    }
  });

  Input* o_in = &inputs_[0];
  announce({layer.o.w}, layer.o.row_bytes, D, tokens);
  expect(o_in, layer.o, tokens);
  for_tokens(tokens, 2 * D, [&](int t, int thread) {
    const size_t at = static_cast<size_t>(t) * D;
    float* gated = thread_floats(thread);
    kernels_->gate_norm(g + at, h + at, layer.g_norm, spec_.gate_norm_eps, D, gated);
    kernels_->normalise(gated, spec_.linear_norm_eps, D, gated);
    quantise(o_in, t, gated);
  });
  prepare(&o_in, 1, tokens, "output of the token mixer", l);
  add_product(*o_in, tokens);
}

// x += linear(input)
void Model::add_product(const Input& input, int tokens) {
  const int n = input.linear->n;
  float* x = x_.need<float>(0);
  const int step = rows_per_task(n, input.linear->row_bytes, 1, tokens);
  pool_->run((n + step - 1) / step, [&](int task, int thread) {
    const int row = task * step, rows = std::min(step, n - row);
    float* out = thread_floats(thread);
    for (int first = 0; first < tokens; first += kTokenBlock) {
      const int m = std::min(kTokenBlock, tokens - first);
      product(input, row, rows, first, m, out, rows, thread);
      for (int t = 0; t < m; ++t) {
        kernels_->add(x + static_cast<size_t>(first + t) * n + row, out + t * rows, rows);
      }
    }
  });
}

void Model::channel(int l, int tokens) {
  const Layer& layer = layers_[l];
  const int D = spec_.hidden, M = spec_.intermediate;
  float *x = x_.need<float>(0), *y = y_.need<float>(0);
  Input* input = &inputs_[0];
  const size_t row_bytes = layer.gate.row_bytes;
  announce({layer.gate.w, layer.gate.w + M * row_bytes}, row_bytes, M, tokens);
  expect(input, layer.gate, tokens);
  for_tokens(tokens, 2 * D, [&](int t, int thread) {
    float* normed = thread_floats(thread);
    kernels_->rms_norm(x + static_cast<size_t>(t) * D, layer.channel_norm, spec_.norm_eps, D,
                       normed);
    kernels_->normalise(normed, spec_.linear_norm_eps, D, normed);
    quantise(input, t, normed);
  });
  prepare(&input, 1, tokens, "channel mixer", l);

  const int step = rows_per_task(M, layer.gate.row_bytes, 2, tokens);
  pool_->run((M + step - 1) / step, [&](int task, int thread) {
    const int row = task * step, rows = std::min(step, M - row);
    float* gate = thread_floats(thread);
    for (int first = 0; first < tokens; first += kTokenBlock) {
      const int m = std::min(kTokenBlock, tokens - first);
      float* up = gate + static_cast<size_t>(m) * rows;
      product(*input, row, rows, first, m, gate, rows, thread);
      product(*input, M + row, rows, first, m, up, rows, thread);
      for (int t = 0; t < m; ++t) {
        kernels_->silu_mul(gate + t * rows, up + t * rows, rows,
                           y + static_cast<size_t>(first + t) * M + row);
      }
    }
  });

  announce({layer.down.w}, layer.down.row_bytes, D, tokens);
  expect(input, layer.down, tokens);
  for_tokens(tokens, M, [&](int t, int) {
    float* row = y + static_cast<size_t>(t) * M;
    kernels_->normalise(row, spec_.linear_norm_eps, M, row);
    quantise(input, t, row);
  });
  prepare(&input, 1, tokens, "output of the channel mixer", l);
  add_product(*input, tokens);
}

// Logits of the chunk's tokens rows[0..count): float32 [count, V].
void Model::head(const int* rows, int count, float* logits) {
  const int D = spec_.hidden, V = spec_.vocab;
  const float* x = x_.need<float>(0);
  Input* input = &inputs_[0];
  announce({head_.w}, head_.row_bytes, V, count);
  expect(input, head_, count);
  for_tokens(count, 2 * D, [&](int r, int thread) {
    float* normed = thread_floats(thread);
    kernels_->rms_norm(x + static_cast<size_t>(rows[r]) * D, final_norm_, spec_.norm_eps, D,
                       normed);
    kernels_->normalise(normed, spec_.linear_norm_eps, D, normed);
    quantise(input, r, normed);
  });
  prepare(&input, 1, count, "head", -1);
  const int step = rows_per_task(V, head_.row_bytes, 1, count);
  pool_->run((V + step - 1) / step, [&](int task, int thread) {
    const int row = task * step, n = std::min(step, V - row);
    for (int first = 0; first < count; first += kTokenBlock) {
      const int m = std::min(kTokenBlock, count - first);
      product(*input, row, n, first, m, logits + static_cast<size_t>(first) * V + row, V, thread);
    }
  });
}

}  // namespace nomatmul
