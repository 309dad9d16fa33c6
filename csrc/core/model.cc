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
    : graph_(std::make_shared<Graph>(description, isa)),
      owner_(getpid()),
      work_(new Work(isa, threads, hidden())) {}

Model::Model(const Model& other, int threads)
    : graph_(other.graph_), owner_(getpid()), work_(new Work(isa(), threads, hidden())) {}

Model::~Model() {
  if (getpid() != owner_) (void)work_.release();  // see own_process()
}

const Linear& Model::linear(const std::string& name) const {
  const auto found = graph_->linears.find(name);
  if (found == graph_->linears.end() || !found->second->ternary()) {
    throw std::invalid_argument("no ternary linear " + name);
  }
  return *found->second;
}

int Model::active(int layer) const {
  const std::unique_ptr<Mixer>& channel = graph_->layers[layer]->channel;
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
  if (causal() && tokens == work_->reserved && pass().reserved()) return;
  work_->reserved = 0;  // until all of them have it
  for (const std::unique_ptr<Graph::Layer>& block : graph_->layers) {
    block->mixer->reserve(pass());
    if (block->channel != nullptr) block->channel->reserve(pass());
  }
  if (graph_->head != nullptr) pass().reserve(*graph_->head);
  work_->reserved = tokens;
}

void Model::run_block(int layer) {
  const Graph::Layer& block = *graph_->layers[layer];
  pass().layer = layer;
  pass().state_offset = state().offset(layer);
  pass().paged_layer = state().paged(layer);
  block.mixer->run(pass(), block.mixer_norm);
  if (block.channel != nullptr) block.channel->run(pass(), block.channel_norm);
}

// --- encoders --------------------------------------------------------------

void Model::encode(const Texts& texts, float* out, Marks* marks, const Poll& poll) {
  std::lock_guard<std::mutex> lock(work_->mutex);
  const int tokens = static_cast<int>(texts.offsets[texts.count]);
  graph_->embedding.check(texts.ids, tokens);
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
    if (!graph_->embedding.look_up(texts.ids[t], place[t], pass().row(t), pass().floats(thread))) {
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
    if (!graph_->final_norm.apply(pass().row(t), out + static_cast<size_t>(t) * hidden()))
      pass().poison();
  });
  pass().layer = -1;
  pass().check_finite("head");
  pass().mark("norms");
}

}  // namespace nomatmul
