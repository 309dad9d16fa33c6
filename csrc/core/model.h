// The whole step of a ternary MLGRU language model: embedding, blocks, head. Written once, on top
// of the per-ISA primitives in kernels/; the float steps there have the same bits on every ISA and
// the products are exact integers, so logits do not depend on ISA, threads, chunks or batch.
//
// Legend: T tokens of a chunk, D hidden size, M intermediate size, V vocabulary, L layers; of an
// FFF: A active rows of a token (trees * levels).
#pragma once

#include <sys/types.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "core/channels/fff.h"
#include "core/memory.h"
#include "core/pacer.h"
#include "core/thread_pool.h"
#include "kernels/isa.h"

namespace nomatmul {

enum class DType { kU8, kI8, kBF16, kF32 };

struct ModelSpec {
  int vocab = 0, hidden = 0, layers = 0;
  int intermediate = 0;  // of a GLU; 0: blocks without one
  int trees = 0;         // of an FFF in its place; 0: none
  int depth = 0;         // decisions on the way down a tree
  Packing packing = Packing::kTwoBit;
  DType embedding = DType::kBF16;  // kI8 (with a scale a row), kBF16 or kF32
  float norm_eps = 1e-6f, linear_norm_eps = 1e-6f, gate_norm_eps = 1e-5f;
  int chunk = 256;  // tokens that go through the layers together
};

// A packed ternary matrix [n, k] with its scale and the norm that stands before its quantiser.
struct Ternary {
  const uint8_t* w = nullptr;
  const float* norm = nullptr;
  float scale = 0;
  int n = 0, k = 0;
  size_t row_bytes = 0;
};

// A ternary FFF: packed 2-bit rows [V, 2, row bytes], a node's input weights, then its output ones.
struct Trees {
  const uint8_t* rows = nullptr;
  const float *norm_in = nullptr, *norm_out = nullptr;
  float scales[2] = {};  // of input and output weights
};

struct Layer {
  const float *mixer_norm = nullptr, *g_norm = nullptr, *lower_bound = nullptr;
  const float* channel_norm = nullptr;
  Ternary i, f, g, o, gate, down;
  Trees trees;
};

// What one sequence brings to a step. The state, float32 [L, D], is advanced in place, and only
// when the whole step has succeeded.
struct Sequence {
  float* state;
  const int32_t* ids;
  int count;
};

enum class Want { kNone, kLast, kAll };

class Model {
 public:
  Model(const ModelSpec& spec, const Isa& isa, int threads);
  ~Model();
  Model(const Model&) = delete;

  // Points a tensor (names of formats/packed.py) at its bytes, which must outlive the model.
  // Throws std::invalid_argument for an unknown name, a wrong dtype or a wrong size.
  void set(const std::string& name, const void* data, size_t bytes, DType dtype);
  // Throws std::invalid_argument naming the tensors that are still missing.
  void check_complete() const;

  // Must come before each of the calls below, from one thread at a time (the binding holds the
  // GIL): makes the model usable in a process that was forked since the last call.
  void own_process();

  // Advances every sequence by its ids; logits: float32 [sequences, V] (kLast) or
  // [all ids in order, V] (kAll). poll() is called now and then and may throw to stop the step.
  // Throws std::invalid_argument for ids out of range, std::domain_error for non-finite values.
  void step(const std::vector<Sequence>& sequences, Want want, float* logits,
            const std::function<void()>& poll);

  // One block alone: x float32 [T, D] and state float32 [D], both updated in place.
  void block(int layer, float* x, int tokens, float* state);
  // Final norm and head alone: x float32 [T, D] to logits float32 [T, V].
  void logits_of(const float* x, int tokens, float* logits);
  // acc[t][n] = sum_k q[t][k] * w[n][k] of the linear of that name; q int8 [T, k].
  void accumulate(const std::string& linear, const int8_t* q, int tokens, int32_t* acc);
  const Ternary& linear(const std::string& name) const;
  // The walk of a layer's FFF alone: rows and logits [T, A] of x float32 [T, D] behind the norm.
  void walk(int layer, const float* x, int tokens, int32_t* rows, float* logits);
  int active() const { return spec_.trees * (spec_.depth + 1); }

  const ModelSpec& spec() const { return spec_; }
  const Isa& isa() const { return *isa_; }
  int threads() const { return threads_; }
  size_t scratch_bytes() const;

 private:
  struct Slot {
    DType dtype;
    size_t bytes;
    const void** pointer;  // where the address goes, or
    float* value;          // where a few floats are copied to
  };
  // The quantised input of one linear for all tokens of a chunk.
  struct Input {
    Scratch q, prepared, scale;
    const Ternary* linear = nullptr;
    size_t block_bytes = 0;
  };

  void declare();
  void declare_linear(const std::string& name, Ternary* linear, int n, int k);
  void run(const std::vector<Sequence>& sequences, size_t total, Want want, float* logits,
           const std::function<void()>& poll);
  void begin(int tokens);
  void embed(int32_t id, float* x) const;
  void run_layer(int layer, int tokens);
  void mixer(int layer, int tokens);
  void channel(int layer, int tokens);
  void trees(int layer, int tokens);
  FffLayer fff_of(const Layer& layer) const;
  void add_product(const Input& input, int tokens);
  void head(const int* rows, int count, float* logits);

  template <class F>
  void for_tokens(int tokens, int width, F&& fn);
  void expect(Input* input, const Ternary& linear, int tokens);
  void quantise(Input* input, int token, const float* x);
  void check_finite(const char* where, int layer) const;
  void prepare(Input* const* inputs, int count, int tokens, const char* where, int layer);
  void product(const Input& input, int row, int rows, int token, int tokens, float* out, size_t ldo,
               int thread);
  void announce(std::initializer_list<const uint8_t*> weights, size_t row_bytes, int n, int tokens);
  int rows_per_task(int n, size_t row_bytes, int matrices, int tokens) const;
  float* thread_floats(int thread) { return thread_floats_.need<float>(0) + thread * floats_; }

  ModelSpec spec_;
  const Isa* isa_;
  const TernaryKernels* kernels_;
  int threads_;
  std::unique_ptr<ThreadPool> pool_;
  Pacer pacer_;
  pid_t owner_;
  std::unique_ptr<std::mutex> mutex_;

  const void* embedding_ = nullptr;
  const float* embedding_scale_ = nullptr;
  const float* final_norm_ = nullptr;
  Ternary head_;
  std::vector<Layer> layers_;
  std::map<std::string, Slot> slots_;
  std::map<std::string, const Ternary*> linears_;
  std::map<std::string, bool> missing_;

  // Scratch of one chunk.
  Scratch states_, x_, g_, h_, y_, thread_floats_, thread_bytes_;
  std::vector<float*> token_state_;  // token -> state row of its sequence (layer 0)
  size_t floats_ = 0, product_bytes_ = 0;
  Input inputs_[3];
  FffWork fff_work_;
  std::atomic<bool> not_finite_{false};
};

// Below this many values the float steps of several tokens are not worth a parallel region.
constexpr int kInlineValues = 4096;

template <class F>
void Model::for_tokens(int tokens, int width, F&& fn) {
  if (tokens * width <= kInlineValues) {
    for (int t = 0; t < tokens; ++t) fn(t, 0);
  } else {
    pool_->run(tokens, fn);
  }
}

}  // namespace nomatmul
