#include "core/model.h"

#include <unistd.h>

#include <algorithm>
#include <stdexcept>

namespace nomatmul {

Model::Work::Work(const Isa& isa, int threads, int hidden) : pool(threads) {
  pass.isa = &isa;
  pass.pool = &pool;
  pass.threads = pool.size();
  pass.hidden = hidden;
}

Model::Model(const Description& description, const Isa& isa, int threads)
    : owner_(getpid()),
      work_(
          new Work(isa, threads, description.part("embedding").whole("hidden", 1, kMaxElements))) {
  declare(description);
}

Model::~Model() {
  if (getpid() != owner_) (void)work_.release();  // see own_process()
}

void Model::declare(const Description& description) {
  causal_ = description.number("causal") != 0;
  chunk_ = description.whole("chunk", 1, 65536);
  if (causal_) {
    state_ = StateLayout(kv_form_of(description.word("kv")));
    positions_ = description.whole("positions", 1, INT32_MAX);
  }
  const Isa& isa = this->isa();
  embedding_.declare(description.part("embedding"), isa, tensors_);
  const Description& layers = description.part("layers");
  for (int layer = 0; layer < layers.whole("count", 1, 65536); ++layer) {
    declare_block(layers.part(std::to_string(layer)), layer);
  }
  final_norm_.declare(description.part("final_norm"), "final_norm", isa, tensors_);
  if (!description.has("head")) return;
  head_ = std::make_unique<Linear>();
  head_->declare(description.part("head"), "head", isa, tensors_);
  if (description.part("head").flag("tied")) embedding_.tie(head_.get());
  linears_["head"] = head_.get();
}

void Model::declare_block(const Description& description, int layer) {
  const std::string at = "layers." + std::to_string(layer) + ".";
  auto block = std::make_unique<Layer>();
  const auto mixer = [&](const char* name, Norm* norm) {
    const std::string norm_name = std::string(name) + "_norm";
    norm->declare(description.part(norm_name), at + norm_name, isa(), tensors_);
    return make_mixer({description.part(name), at + name, hidden(), isa(), tensors_, linears_});
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

// After fork only the calling thread exists: the pool's threads are gone, a mutex that another
// thread held stays locked, and what it was changing stays half changed: a buffer that was being
// replaced is freed or null. So all of it is replaced, and the old leaked on purpose.
void Model::own_process() {
  if (getpid() == owner_) return;
  auto fresh = std::make_unique<Work>(isa(), threads(), hidden());
  (void)work_.release();
  work_ = std::move(fresh);
  owner_ = getpid();
}

void Model::begin(int tokens) {
  pass().begin(tokens);
  pass().layer = -1;
  // nothing else decides how much room parts need
  if (causal_ && tokens == work_->reserved && pass().reserved()) return;
  work_->reserved = 0;  // until all of them have it
  for (const std::unique_ptr<Layer>& block : blocks_) {
    block->mixer->reserve(pass());
    if (block->channel != nullptr) block->channel->reserve(pass());
  }
  if (head_ != nullptr) pass().reserve(*head_);
  work_->reserved = tokens;
}

void Model::run_block(int layer) {
  const Layer& block = *blocks_[layer];
  pass().layer = layer;
  pass().state_offset = state_.offset(layer);
  pass().paged_layer = state_.paged(layer);
  block.mixer->run(pass(), block.mixer_norm);
  if (block.channel != nullptr) block.channel->run(pass(), block.channel_norm);
}

// --- encoders --------------------------------------------------------------

void Model::encode(const Texts& texts, float* out, Marks* marks, const Poll& poll) {
  std::lock_guard<std::mutex> lock(work_->mutex);
  const int tokens = static_cast<int>(texts.offsets[texts.count]);
  embedding_.check(texts.ids, tokens);
  pass().spans.clear();
  std::vector<int> place(tokens);
  for (int b = 0; b < texts.count; ++b) {
    const int first = static_cast<int>(texts.offsets[b]);
    pass().spans.push_back({first, static_cast<int>(texts.offsets[b + 1]) - first});
    for (int t = first; t < texts.offsets[b + 1]; ++t) place[t] = t - first;
  }
  pass().seen = texts.seen;
  pass().marks = marks;
  begin(tokens);
  pass().for_tokens(tokens, hidden(), [&](int t, int thread) {
    if (!embedding_.look_up(texts.ids[t], place[t], pass().row(t), pass().floats(thread))) {
      pass().poison();
    }
  });
  pass().mark("embedding");
  for (int layer = 0; layer < layers(); ++layer) {
    pass().paths = texts.paths.empty() ? nullptr : texts.paths[layer];
    run_block(layer);
    poll(false);
  }
  pass().for_tokens(tokens, hidden(), [&](int t, int) {
    if (!final_norm_.apply(pass().row(t), out + static_cast<size_t>(t) * hidden())) pass().poison();
  });
  pass().layer = -1;
  pass().check_finite("head");
  pass().mark("norms");
}

}  // namespace nomatmul
