// One pass of a chunk of tokens through a graph: what its parts work on and share. A part reads and
// writes x, finds room in the buffers, and runs its work on the pool.
//
// Legend: T tokens of the chunk, D hidden size.
#pragma once

#include <atomic>
#include <chrono>
#include <initializer_list>
#include <map>
#include <string>
#include <vector>

#include "core/channels/fff.h"
#include "core/linear.h"
#include "core/memory.h"
#include "core/pages.h"
#include "core/rotary.h"
#include "core/thread_pool.h"

namespace nomatmul {

// Seconds of each kind of step.
class Marks {
 public:
  // What happened since the last mark belongs to `part`.
  void mark(const char* part) {
    const auto now = Clock::now();
    seconds_[part] += std::chrono::duration<double>(now - last_).count();
    last_ = now;
  }
  const std::map<std::string, double>& seconds() const { return seconds_; }

 private:
  using Clock = std::chrono::steady_clock;
  std::map<std::string, double> seconds_;
  Clock::time_point last_ = Clock::now();
};

// Tokens that see each other: places first .. first + count - 1 of the chunk.
struct Span {
  int first, count;
};

// Tokens of the chunk that belong to one sequence of a causal model: places first .. first + count
// - 1 of the chunk, positions from `position` on of the sequence. pages: nullptr where none grow.
struct Stretch {
  Pages* pages;
  int first, count, position;
};

struct Pass {
  const Isa* isa = nullptr;
  ThreadPool* pool = nullptr;
  int threads = 1, hidden = 0;

  int tokens = 0, layer = 0;
  Scratch x;  // float32 [T, D]
  // Of causal models: each token's sequence's state, its pieces layer by layer, and where those of
  // the layer begin. Of others: which tokens belong together, and nullptr or 0 for hidden tokens.
  std::vector<float*> token_state;
  size_t state_offset = 0;
  // The stretches of causal models, in order, and where the layer's keys and values lie in pages.
  std::vector<Stretch> stretches;
  int paged_layer = 0;
  RotaryTable rotary;
  std::vector<Span> spans;
  const uint8_t* seen = nullptr;
  int32_t* paths = nullptr;  // nullptr, or the rows that the layer's trees visit [T, active]
  Marks* marks = nullptr;

  // Buffers that parts share; a part finds nothing of an earlier one in them.
  Scratch a, b, c;
  LinearInput inputs[3];
  FffWork trees;

  float* row(int token) { return x.data<float>() + static_cast<size_t>(token) * hidden; }
  float* state(int token) const { return token_state[token] + state_offset; }
  const Stretch& stretch(int token) const {
    size_t s = 0;
    while (token >= stretches[s].first + stretches[s].count) ++s;
    return stretches[s];
  }
  int position(int token) const {
    const Stretch& of = stretch(token);
    return of.position + token - of.first;
  }
  float* floats(int thread) { return thread_floats_.data<float>() + thread * floats_; }
  uint8_t* bytes(int thread) { return thread_bytes_.data<uint8_t>() + thread * bytes_; }
  void mark(const char* part) {
    if (marks != nullptr) marks->mark(part);
  }

  // A part says, before it runs, what a thread of its tasks needs: so much, or `kept` tiles of
  // products that are cut for `outputs` outputs of `matrices` matrices together.
  void reserve(size_t floats, size_t bytes);
  void reserve(const Linear& linear) { reserve(linear, linear.outputs(), 1, 1); }
  void reserve(const Linear& linear, int outputs, int matrices, int kept);
  // False where what was reserved is gone: there was no memory for more.
  bool reserved() const { return floats_ > 0; }
  size_t scratch_size() const;

  // fn(token, thread) for every token; few of them, or narrow ones, on the calling thread.
  template <class F>
  void for_tokens(int count, int width, F&& fn) {
    constexpr int kInlineValues = 4096;  // below, a parallel region costs more than it saves
    if (count * width <= kInlineValues) {
      for (int t = 0; t < count; ++t) fn(t, 0);
      return;
    }
    const int step = std::max(1, std::min(16, count / (8 * threads)));
    pool->run((count + step - 1) / step, [&](int task, int thread) {
      for (int t = task * step; t < std::min(count, (task + 1) * step); ++t) fn(t, thread);
    });
  }

  // fn(row, rows, first, m, thread) for tiles of outputs row.. and tokens first...
  template <class F>
  void for_tiles(const Cut& cut, F&& fn) {
    for_tiles({cut}, [&](int, int row, int rows, int first, int m, int thread) {
      fn(row, rows, first, m, thread);
    });
  }
  // fn(which, ...) of several products in one region.
  template <class F>
  void for_tiles(std::initializer_list<Cut> cuts, F&& fn) {
    int tasks = 0;
    for (const Cut& cut : cuts) tasks += cut.tasks();
    pool->run(tasks, [&](int task, int thread) {
      int which = 0;
      const Cut* cut = cuts.begin();
      for (; task >= cut->tasks(); ++cut, ++which) task -= cut->tasks();
      const int outputs = cut->output_tasks(), blocks = cut->in_order ? cut->token_tasks() : 1;
      const int row = task % outputs * cut->output_step;
      for (int block = task / outputs; block < task / outputs + blocks; ++block) {
        const int first = block * cut->token_step;
        fn(which, row, std::min(cut->output_step, cut->outputs - row), first,
           std::min(cut->token_step, cut->tokens - first), thread);
      }
    });
  }

  Cut cut(const Linear& linear, int outputs, int matrices = 1) const {
    return linear.cut(outputs, matrices, tokens, threads);
  }
  void tile(const LinearInput& input, int row, int rows, int token, int count, float* out,
            size_t ldo, int thread) {
    input.linear->tile(input.fed(), row, rows, token, count, out, ldo, bytes(thread));
  }

  // While this thread does the float steps before a product, the others may fetch its first
  // weights.
  void announce(const Linear& linear, std::initializer_list<const uint8_t*> weights, int outputs,
                int count);
  // Where a token's input is to be written: a row of the input's values, else `scratch`.
  float* place(const LinearInput& input, int token, float* scratch) const {
    return input.values == nullptr
               ? scratch
               : input.values + static_cast<size_t>(token) * input.linear->inputs();
  }
  // Makes the first inputs those of linears; one that takes the input of an earlier one shares it.
  void expect(std::initializer_list<const Linear*> linears, int count);
  // Gives a token's row, which may change, to the linears of inputs[0..products).
  void feed(int products, int token, float* row, int thread);
  // Ends their feeding of `count` tokens. Throws std::domain_error, naming the part, where one is
  // not finite.
  void prepare(int products, int count, const char* where);
  // Makes values [T, inputs], which may change, the input of a linear: inputs[0].
  void feed_values(const Linear& linear, float* values, const char* where);
  void check_finite(const char* where) const;
  void poison() { not_finite_.store(true, std::memory_order_relaxed); }

  // Of inputs[0], `count` tokens: out [count, outputs] = the product.
  void product(int count, float* out);
  // to [T, outputs] += the product of inputs[0].
  void add_product(float* to);
  // to [T, outputs] += the linear of values [T, inputs], which may change.
  void add_linear(const Linear& linear, float* values, const char* where, float* to);

  void begin(int count);

 private:
  Scratch thread_floats_, thread_bytes_;
  size_t floats_ = 0, bytes_ = 0;
  std::atomic<bool> not_finite_{false};
};

}  // namespace nomatmul
