// Steps of causal models: chunks of the tokens of all sequences go through the layers.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <numeric>
#include <stdexcept>

#include "core/model.h"

namespace nomatmul {

// All ids, checked with the sequences' lengths before any work.
size_t Model::checked(const std::vector<Sequence>& sequences) const {
  size_t total = 0;
  for (const Sequence& sequence : sequences) {
    graph_->embedding.check(sequence.ids, sequence.count);
    total += sequence.count;
    if (!graph_->state.grows()) continue;
    const int64_t length = sequence.pages->length();
    if (length + sequence.count > graph_->positions) {
      throw std::invalid_argument(std::to_string(sequence.count) + " tokens behind " +
                                  std::to_string(length) + " are more than the model's " +
                                  std::to_string(graph_->positions) + " positions");
    }
  }
  return total;
}

void Model::step(const std::vector<Sequence>& sequences, Want want, float* out, Marks* marks,
                 const Poll& poll) {
  std::lock_guard<std::mutex> lock(work_->mutex);
  pass().marks = marks;
  const size_t total = checked(sequences);
  if (total != 1 || pass().threads == 1) {
    work_->pool.set_alone(false);
    return run(sequences, total, want, out, poll);
  }
  using Clock = std::chrono::steady_clock;
  work_->pool.set_alone(work_->pacer.alone());
  const auto start = Clock::now();
  const int troubles = work_->pool.troubles();
  run(sequences, total, want, out, poll);
  const std::chrono::duration<double> spent = Clock::now() - start;
  work_->pacer.add(spent.count(), work_->pool.troubles() - troubles);
}

void Model::run(const std::vector<Sequence>& sequences, size_t total, Want want, float* out,
                const Poll& poll) {
  if (!work_->pool.alone()) work_->pool.wake();
  const size_t state_floats = graph_->state.floats();
  // The layers work on copies of the states and behind the ends of the pages, so that a step that
  // fails leaves every sequence as it was.
  float* states = work_->states.need<float>(sequences.size() * state_floats);
  for (size_t s = 0; s < sequences.size(); ++s) {
    std::memcpy(states + s * state_floats, sequences[s].state, state_floats * sizeof(float));
  }
  try {
    for (const Sequence& sequence : sequences) {
      if (sequence.pages != nullptr) sequence.pages->reserve(sequence.count);
    }
    advance(sequences, total, want, out, poll);
  } catch (...) {
    for (const Sequence& sequence : sequences) {
      if (sequence.pages != nullptr) sequence.pages->roll_back(sequence.pages->length());
    }
    throw;
  }
  for (size_t s = 0; s < sequences.size(); ++s) {
    std::memcpy(sequences[s].state, states + s * state_floats, state_floats * sizeof(float));
    if (sequences[s].pages != nullptr) sequences[s].pages->advance(sequences[s].count);
  }
}

// Everything of a step that may fail.
void Model::advance(const std::vector<Sequence>& sequences, size_t total, Want want, float* out,
                    const Poll& poll) {
  float* states = work_->states.data<float>();
  size_t s = 0;
  int t = 0;
  std::vector<int> rows;  // tokens of the chunk that something is asked for
  for (size_t done = 0; done < total;) {
    const int tokens = static_cast<int>(std::min<size_t>(graph_->chunk, total - done));
    begin(tokens);
    rows.clear();
    pass().stretches.clear();
    for (int c = 0; c < tokens; ++c) {
      while (t == sequences[s].count) ++s, t = 0;
      graph_->embedding.look_up(sequences[s].ids[t], 0, pass().row(c), nullptr);
      pass().token_state[c] = states + s * graph_->state.floats();
      if (Pages* pages = sequences[s].pages; pages != nullptr) {
        if (t == 0 || c == 0) pass().stretches.push_back({pages, c, 0, pages->length() + t});
        ++pass().stretches.back().count;
      }
      ++t;
      if (want == Want::kAll || (want != Want::kNone && t == sequences[s].count)) {
        rows.push_back(c);
      }
    }
    pass().mark("embedding");
    for (int layer = 0; layer < layers(); ++layer) {
      run_block(layer);
      if (tokens > 1) poll(false);
    }
    const int count = static_cast<int>(rows.size());
    if (count > 0 && want == Want::kHidden) {
      final_states(rows.data(), count, out);
      out += static_cast<size_t>(count) * hidden();
    } else if (count > 0) {
      head(rows.data(), count, out);
      out += static_cast<size_t>(count) * graph_->head->outputs();
    }
    done += tokens;
    poll(done == total);
  }
}

// Logits of the chunk's tokens rows[0..count): float32 [count, V].
void Model::head(const int* rows, int count, float* logits) {
  pass().layer = -1;
  pass().announce(*graph_->head, {graph_->head->row(0)}, graph_->head->outputs(), count);
  feed_norm(pass(), graph_->final_norm, {graph_->head.get()}, "head", rows, count);
  pass().product(count, logits);
  pass().mark("head");
}

void Model::final_states(const int* rows, int count, float* out) {
  pass().layer = -1;
  for (int i = 0; i < count; ++i, out += hidden()) {
    graph_->final_norm.apply(pass().row(rows[i]), out);
    const bool finite = std::all_of(out, out + hidden(), [](float x) { return std::isfinite(x); });
    if (!finite) pass().poison();
  }
  pass().check_finite("head");
}

// fn(first, count) for chunks of x [tokens, D], each in pass().x.
template <class F>
void Model::in_chunks(const float* x, int tokens, F&& fn) {
  pass().marks = nullptr;  // those of the last step are gone
  for (int first = 0; first < tokens; first += graph_->chunk) {
    const int count = std::min(graph_->chunk, tokens - first);
    begin(count);
    std::memcpy(pass().row(0), x + static_cast<size_t>(first) * hidden(),
                sizeof(float) * count * hidden());
    fn(first, count);
  }
}

void Model::block(int layer, float* x, int tokens, float* state) {
  std::lock_guard<std::mutex> lock(work_->mutex);
  float* states = work_->states.need<float>(graph_->state.floats());
  float* of_layer = states + graph_->state.offset(layer);
  const size_t bytes = graph_->state.width() * sizeof(float);
  std::memcpy(of_layer, state, bytes);
  Pages pages(graph_->state.pages());
  if (graph_->state.grows()) pages.reserve(tokens);
  in_chunks(x, tokens, [&](int first, int count) {
    pass().stretches.assign(1, {&pages, 0, count, first});
    for (int c = 0; c < count; ++c) pass().token_state[c] = states;
    run_block(layer);
    std::memcpy(x + static_cast<size_t>(first) * hidden(), pass().row(0),
                sizeof(float) * count * hidden());
  });
  std::memcpy(state, of_layer, bytes);
}

void Model::logits_of(const float* x, int tokens, float* logits) {
  std::lock_guard<std::mutex> lock(work_->mutex);
  std::vector<int> rows(std::min(graph_->chunk, tokens));
  std::iota(rows.begin(), rows.end(), 0);
  in_chunks(x, tokens, [&](int first, int count) {
    head(rows.data(), count, logits + static_cast<size_t>(first) * graph_->head->outputs());
  });
}

void Model::accumulate(const std::string& name, const int8_t* q, int tokens, int32_t* acc) {
  linear(name).accumulate(q, tokens, acc);
}

void Model::walk(int layer, const float* x, int tokens, int32_t* rows, float* logits) {
  std::lock_guard<std::mutex> lock(work_->mutex);
  graph_->layers[layer]->channel->walk(pass(), x, tokens, rows, logits);
}

}  // namespace nomatmul
