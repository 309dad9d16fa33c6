// A model as a graph of parts: decoders, which are stepped token by token, and encoders, which read
// whole sequences. Written once, on top of the per-ISA tables in kernels/.
//
// In causal models the float steps have the same bits on every ISA and the products are exact
// integers, so logits do not depend on ISA, threads, chunks or batch.
//
// Legend: T tokens of a chunk, D hidden size, V vocabulary, L layers; of an FFF: A active
// rows of a token (trees * levels).
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "core/graph.h"
#include "core/pacer.h"

namespace nomatmul {

// What one sequence brings to a step. The state, float32 as state() lays it out, and the pages
// (nullptr where nothing grows) are advanced in place, and only when the whole step has succeeded.
struct Sequence {
  float* state;
  Pages* pages;
  const int32_t* ids;
  int count;
};

// Called now and then while a model computes, and once when a step is done but does not count yet:
// poll(true). It may throw; then nothing has changed.
using Poll = std::function<void(bool)>;

// Logits of each sequence's last token, of all tokens, or of none; kHidden: the final-normed state
// of each sequence's last token instead.
enum class Want { kNone, kLast, kAll, kHidden };

// Sequences of an encoder, end to end: ids [N], offsets [count + 1]; seen [N] or nullptr: 0 hides a
// token from the others. paths: by layer, int32 [N, A] or nullptr.
struct Texts {
  const int32_t* ids;
  const int64_t* offsets;
  int count;
  const uint8_t* seen;
  std::vector<int32_t*> paths;
};

class Model {
 public:
  Model(const Description& description, const Isa& isa, int threads);
  // Of the same weights, which live as long as any model of them.
  Model(const Model& other, int threads);
  ~Model();
  Model(const Model&) = delete;

  // The tensors (names of the packed directory), to be set before the first step.
  Tensors& tensors() { return graph_->tensors; }
  const Tensors& tensors() const { return graph_->tensors; }

  // Must come before each of the calls below, from one thread at a time (the binding holds the
  // GIL): makes the model usable in a process that was forked since the last call, whatever other
  // threads were doing then. What they were writing to is lost: their sequences and outputs.
  void own_process();

  // Advances every sequence by its ids; out: float32 [sequences, V] (kLast), [all ids in order, V]
  // (kAll) or [sequences, D] (kHidden). marks: nullptr, or receives the
  // seconds of its parts. Throws std::invalid_argument for ids out of range and for more positions
  // than the model has, std::domain_error for non-finite values.
  void step(const std::vector<Sequence>& sequences, Want want, float* out, Marks* marks,
            const Poll& poll);
  // Final-normed states of an encoder: float32 [N, D]. Throws like step().
  void encode(const Texts& texts, float* out, Marks* marks, const Poll& poll);

  // One block of a causal model alone: x float32 [T, D] and its layer's state, both in place;
  // keys and values begin with x.
  void block(int layer, float* x, int tokens, float* state);
  // Final norm and head alone: x float32 [T, D] to logits float32 [T, V].
  void logits_of(const float* x, int tokens, float* logits);
  // acc[t][n] = sum_k q[t][k] * w[n][k] of the ternary linear of that name; q int8 [T, k].
  void accumulate(const std::string& linear, const int8_t* q, int tokens, int32_t* acc);
  const Linear& linear(const std::string& name) const;
  // The walk of a layer's FFF alone: rows and logits [T, A] of x float32 [T, D] behind the norm.
  void walk(int layer, const float* x, int tokens, int32_t* rows, float* logits);

  bool causal() const { return graph_->causal; }
  int hidden() const { return graph_->hidden; }
  int layers() const { return static_cast<int>(graph_->layers.size()); }
  int vocabulary() const { return graph_->embedding.vocabulary(); }
  int active(int layer) const;  // 0 where the layer has no trees
  const StateLayout& state() const { return graph_->state; }
  const Isa& isa() const { return graph_->isa; }
  int threads() const { return work_->pass.threads; }
  size_t scratch_bytes() const { return work_->states.size() + work_->pass.scratch_size(); }

 private:
  // Everything that calls change.
  struct Work {
    Work(const Isa& isa, int threads, int hidden);

    ThreadPool pool;
    std::mutex mutex;
    Pacer pacer;
    Scratch states;
    Pass pass;
    int reserved = 0;  // the tokens that parts have made room for
  };

  size_t checked(const std::vector<Sequence>& sequences) const;
  void run(const std::vector<Sequence>& sequences, size_t total, Want want, float* out,
           const Poll& poll);
  void advance(const std::vector<Sequence>& sequences, size_t total, Want want, float* out,
               const Poll& poll);
  Pass& pass() { return work_->pass; }
  void begin(int tokens);
  void run_block(int layer);
  template <class F>
  void in_chunks(const float* x, int tokens, F&& fn);
  void head(const int* rows, int count, float* logits);
  void final_states(const int* rows, int count, float* out);

  std::shared_ptr<Graph> graph_;
  pid_t owner_;
  std::unique_ptr<Work> work_;
};

}  // namespace nomatmul
