#include "core/model.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <numeric>
#include <stdexcept>

namespace nomatmul {

Model::Model(const Description& description, const Isa& isa, int threads)
    : pool_(new ThreadPool(std::max(1, threads))), owner_(getpid()), mutex_(new std::mutex) {
  pass_.isa = &isa;
  pass_.pool = pool_.get();
  pass_.threads = std::max(1, threads);
  declare(description);
}

Model::~Model() {
  // In a forked child the workers do not exist and the mutex may be held for ever.
  if (getpid() != owner_) {
    ThreadPool::abandon(std::move(pool_));
    (void)mutex_.release();
  }
}

void Model::declare(const Description& description) {
  causal_ = description.number("causal") != 0;
  chunk_ = description.whole("chunk", 1, 65536);
  const Isa& isa = *pass_.isa;
  embedding_.declare(description.part("embedding"), isa, tensors_);
  pass_.hidden = description.part("embedding").whole("hidden", 1, kMaxElements);
  const Description& layers = description.part("layers");
  for (int layer = 0; layer < layers.whole("count", 1, 65536); ++layer) {
    declare_block(layers.part(std::to_string(layer)), layer);
  }
  final_norm_.declare(description.part("final_norm"), "final_norm", isa, tensors_);
  if (!description.has("head")) return;
  head_ = std::make_unique<Linear>();
  head_->declare(description.part("head"), "head", isa, tensors_);
  linears_["head"] = head_.get();
}

void Model::declare_block(const Description& description, int layer) {
  const std::string at = "layers." + std::to_string(layer) + ".";
  auto block = std::make_unique<Layer>();
  const auto mixer = [&](const char* name, Norm* norm) {
    const std::string norm_name = std::string(name) + "_norm";
    norm->declare(description.part(norm_name), at + norm_name, *pass_.isa, tensors_);
    return make_mixer(
        {description.part(name), at + name, pass_.hidden, *pass_.isa, tensors_, linears_});
  };
  block->mixer = mixer("mixer", &block->mixer_norm);
  if (description.has("channel")) block->channel = mixer("channel", &block->channel_norm);
  state_.add(at + "mixer (" + description.part("mixer").kind + ")", block->mixer->state());
  blocks_.push_back(std::move(block));
}

const Linear& Model::linear(const std::string& name) const {
  const auto found = linears_.find(name);
  if (found == linears_.end() || !found->second->ternary()) {
    throw std::invalid_argument("no ternary linear " + name);
  }
  return *found->second;
}

int Model::active(int layer) const {
  const std::unique_ptr<Mixer>& channel = blocks_[layer]->channel;
  return channel == nullptr ? 0 : channel->active();
}

// After fork only the calling thread exists: the pool's threads are gone, and a mutex that another
// thread held stays locked. Both are replaced, the old ones leaked on purpose.
void Model::own_process() {
  if (getpid() == owner_) return;
  ThreadPool::abandon(std::move(pool_));
  (void)mutex_.release();
  mutex_.reset(new std::mutex);
  pool_.reset(new ThreadPool(pass_.threads));
  pass_.pool = pool_.get();
  owner_ = getpid();
}

void Model::begin(int tokens) {
  pass_.begin(tokens);
  pass_.layer = -1;
  if (causal_ && tokens == reserved_) return;  // nothing else decides how much room parts need
  reserved_ = tokens;
  for (const std::unique_ptr<Layer>& block : blocks_) {
    block->mixer->reserve(pass_);
    if (block->channel != nullptr) block->channel->reserve(pass_);
  }
  if (head_ != nullptr) pass_.reserve(*head_);
}

void Model::run_block(int layer) {
  const Layer& block = *blocks_[layer];
  pass_.layer = layer;
  pass_.state_offset = state_.offset(layer);
  block.mixer->run(pass_, block.mixer_norm);
  if (block.channel != nullptr) block.channel->run(pass_, block.channel_norm);
}

// --- decoders --------------------------------------------------------------

void Model::step(const std::vector<Sequence>& sequences, Want want, float* logits,
                 const std::function<void()>& poll) {
  std::lock_guard<std::mutex> lock(*mutex_);
  size_t total = 0;
  for (const Sequence& sequence : sequences) {
    embedding_.check(sequence.ids, sequence.count);
    total += sequence.count;
  }
  if (total != 1 || pass_.threads == 1) {
    pool_->set_alone(false);
    return run(sequences, total, want, logits, poll);
  }
  using Clock = std::chrono::steady_clock;
  pool_->set_alone(pacer_.alone());
  const auto start = Clock::now();
  const int troubles = pool_->troubles();
  run(sequences, total, want, logits, poll);
  const std::chrono::duration<double> spent = Clock::now() - start;
  pacer_.add(spent.count(), pool_->troubles() - troubles);
}

void Model::run(const std::vector<Sequence>& sequences, size_t total, Want want, float* logits,
                const std::function<void()>& poll) {
  if (!pool_->alone()) pool_->wake();
  const size_t state_floats = state_.floats();
  // The layers work on copies, so that a step that fails leaves every sequence as it was.
  float* states = states_.need<float>(sequences.size() * state_floats);
  for (size_t s = 0; s < sequences.size(); ++s) {
    std::memcpy(states + s * state_floats, sequences[s].state, state_floats * sizeof(float));
  }
  size_t s = 0;
  int t = 0;
  std::vector<int> rows;  // tokens of the chunk whose logits are asked for
  for (size_t done = 0; done < total;) {
    const int tokens = static_cast<int>(std::min<size_t>(chunk_, total - done));
    begin(tokens);
    rows.clear();
    for (int c = 0; c < tokens; ++c) {
      while (t == sequences[s].count) ++s, t = 0;
      embedding_.look_up(sequences[s].ids[t], 0, pass_.row(c), nullptr);
      pass_.token_state[c] = states + s * state_floats;
      ++t;
      if (want == Want::kAll || (want == Want::kLast && t == sequences[s].count)) {
        rows.push_back(c);
      }
    }
    for (int layer = 0; layer < layers(); ++layer) {
      run_block(layer);
      if (tokens > 1) poll();
    }
    if (!rows.empty()) {
      head(rows.data(), static_cast<int>(rows.size()), logits);
      logits += rows.size() * static_cast<size_t>(head_->outputs());
    }
    done += tokens;
    poll();
  }
  for (size_t i = 0; i < sequences.size(); ++i) {
    std::memcpy(sequences[i].state, states + i * state_floats, state_floats * sizeof(float));
  }
}

// Logits of the chunk's tokens rows[0..count): float32 [count, V].
void Model::head(const int* rows, int count, float* logits) {
  pass_.layer = -1;
  pass_.announce(*head_, {head_->row(0)}, head_->outputs(), count);
  feed_norm(pass_, final_norm_, {head_.get()}, "head", rows, count);
  pass_.product(count, logits);
}

// fn(first, count) for chunks of x [tokens, D], each in pass_.x.
template <class F>
void Model::in_chunks(const float* x, int tokens, F&& fn) {
  for (int first = 0; first < tokens; first += chunk_) {
    const int count = std::min(chunk_, tokens - first);
    begin(count);
    std::memcpy(pass_.row(0), x + static_cast<size_t>(first) * hidden(),
                sizeof(float) * count * hidden());
    fn(first, count);
  }
}

void Model::block(int layer, float* x, int tokens, float* state) {
  std::lock_guard<std::mutex> lock(*mutex_);
  float* states = states_.need<float>(state_.floats());
  float* of_layer = states + state_.offset(layer);
  const size_t bytes = state_.width() * sizeof(float);
  std::memcpy(of_layer, state, bytes);
  in_chunks(x, tokens, [&](int first, int count) {
    for (int c = 0; c < count; ++c) pass_.token_state[c] = states;
    run_block(layer);
    std::memcpy(x + static_cast<size_t>(first) * hidden(), pass_.row(0),
                sizeof(float) * count * hidden());
  });
  std::memcpy(state, of_layer, bytes);
}

void Model::logits_of(const float* x, int tokens, float* logits) {
  std::lock_guard<std::mutex> lock(*mutex_);
  std::vector<int> rows(std::min(chunk_, tokens));
  std::iota(rows.begin(), rows.end(), 0);
  in_chunks(x, tokens, [&](int first, int count) {
    head(rows.data(), count, logits + static_cast<size_t>(first) * head_->outputs());
  });
}

void Model::accumulate(const std::string& name, const int8_t* q, int tokens, int32_t* acc) {
  linear(name).accumulate(q, tokens, acc);
}

void Model::walk(int layer, const float* x, int tokens, int32_t* rows, float* logits) {
  std::lock_guard<std::mutex> lock(*mutex_);
  blocks_[layer]->channel->walk(pass_, x, tokens, rows, logits);
}

// --- encoders --------------------------------------------------------------

void Model::encode(const Texts& texts, float* out, Marks* marks,
                   const std::function<void()>& poll) {
  std::lock_guard<std::mutex> lock(*mutex_);
  const int tokens = static_cast<int>(texts.offsets[texts.count]);
  embedding_.check(texts.ids, tokens);
  pass_.spans.clear();
  std::vector<int> place(tokens);
  for (int b = 0; b < texts.count; ++b) {
    const int first = static_cast<int>(texts.offsets[b]);
    pass_.spans.push_back({first, static_cast<int>(texts.offsets[b + 1]) - first});
    for (int t = first; t < texts.offsets[b + 1]; ++t) place[t] = t - first;
  }
  pass_.seen = texts.seen;
  pass_.marks = marks;
  begin(tokens);
  pass_.for_tokens(tokens, hidden(), [&](int t, int thread) {
    if (!embedding_.look_up(texts.ids[t], place[t], pass_.row(t), pass_.floats(thread))) {
      pass_.poison();
    }
  });
  pass_.mark("embedding");
  for (int layer = 0; layer < layers(); ++layer) {
    pass_.paths = texts.paths.empty() ? nullptr : texts.paths[layer];
    run_block(layer);
    poll();
  }
  pass_.for_tokens(tokens, hidden(), [&](int t, int) {
    if (!final_norm_.apply(pass_.row(t), out + static_cast<size_t>(t) * hidden())) pass_.poison();
  });
  pass_.layer = -1;
  pass_.check_finite("head");
  pass_.mark("norms");
}

}  // namespace nomatmul
