// Tensors of the model, and the way of a batch through it; the blocks are in blocks.cc.
#include "core/model.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <stdexcept>

namespace nomatmul {

Model::Model(const ModelSpec& spec, const Isa& isa, int threads)
    : spec_(spec),
      isa_(&isa),
      kernels_(isa.ternary),
      threads_(std::max(1, threads)),
      pool_(new ThreadPool(threads_)),
      owner_(getpid()),
      mutex_(new std::mutex),
      layers_(spec.layers) {
  declare();
}

Model::~Model() {
  // In a forked child the workers do not exist and the mutex may be held for ever.
  if (getpid() != owner_) {
    ThreadPool::abandon(std::move(pool_));
    (void)mutex_.release();
  }
}

void Model::declare_linear(const std::string& name, Ternary* linear, int n, int k) {
  linear->n = n;
  linear->k = k;
  linear->row_bytes = row_bytes_of(spec_.packing, k);
  linears_[name] = linear;
  slots_[name + ".packed"] = {DType::kU8, linear->row_bytes * n,
                              reinterpret_cast<const void**>(&linear->w), nullptr};
  slots_[name + ".scale"] = {DType::kF32, sizeof(float), nullptr, &linear->scale};
  slots_[name + ".norm.weight"] = {DType::kF32, sizeof(float) * k,
                                   reinterpret_cast<const void**>(&linear->norm), nullptr};
}

void Model::declare() {
  const int D = spec_.hidden, M = spec_.intermediate, V = spec_.vocab;
  const auto floats = [this](const std::string& name, const float** pointer, size_t count) {
    slots_[name] = {DType::kF32, sizeof(float) * count, reinterpret_cast<const void**>(pointer),
                    nullptr};
  };
  const size_t width = spec_.embedding == DType::kI8 ? 1 : spec_.embedding == DType::kBF16 ? 2 : 4;
  slots_["embedding.weight"] = {spec_.embedding, width * V * static_cast<size_t>(D), &embedding_,
                                nullptr};
  if (spec_.embedding == DType::kI8) floats("embedding.scale", &embedding_scale_, V);
  for (int l = 0; l < spec_.layers; ++l) {
    Layer& layer = layers_[l];
    const std::string at = "layers." + std::to_string(l) + ".";
    floats(at + "mixer_norm.weight", &layer.mixer_norm, D);
    floats(at + "mixer.g_norm.weight", &layer.g_norm, D);
    floats(at + "mixer.lower_bound", &layer.lower_bound, D);
    declare_linear(at + "mixer.i_proj", &layer.i, D, D);
    declare_linear(at + "mixer.f_proj", &layer.f, D, D);
    declare_linear(at + "mixer.g_proj", &layer.g, D, D);
    declare_linear(at + "mixer.o_proj", &layer.o, D, D);
    if (spec_.trees != 0) {
      const std::string rows = at + "channel.rows";
      const size_t count = static_cast<size_t>(fff_rows(spec_.trees, spec_.depth));
      floats(at + "channel_norm.weight", &layer.channel_norm, D);
      floats(at + "channel.norm_in.weight", &layer.trees.norm_in, D);
      floats(at + "channel.norm_out.weight", &layer.trees.norm_out, count);
      slots_[rows + ".scale"] = {DType::kF32, sizeof layer.trees.scales, nullptr,
                                 layer.trees.scales};
      slots_[rows + ".packed"] = {DType::kU8, 2 * count * row_bytes_of(Packing::kTwoBit, D),
                                  reinterpret_cast<const void**>(&layer.trees.rows), nullptr};
      continue;
    }
    if (M == 0) continue;
    floats(at + "channel_norm.weight", &layer.channel_norm, D);
    declare_linear(at + "channel.gate_proj", &layer.gate, 2 * M, D);
    declare_linear(at + "channel.down_proj", &layer.down, D, M);
  }
  floats("final_norm.weight", &final_norm_, D);
  declare_linear("head", &head_, V, D);
  for (const auto& slot : slots_) missing_[slot.first] = true;
}

void Model::set(const std::string& name, const void* data, size_t bytes, DType dtype) {
  const auto found = slots_.find(name);
  if (found == slots_.end()) throw std::invalid_argument("no tensor " + name + " in this model");
  const Slot& slot = found->second;
  if (dtype != slot.dtype) throw std::invalid_argument(name + " has the wrong dtype");
  if (bytes != slot.bytes) {
    throw std::invalid_argument(name + " has " + std::to_string(bytes) + " bytes, expected " +
                                std::to_string(slot.bytes));
  }
  if (slot.value != nullptr) {
    std::memcpy(slot.value, data, slot.bytes);
  } else {
    if (dtype == DType::kF32 && reinterpret_cast<uintptr_t>(data) % alignof(float) != 0) {
      throw std::invalid_argument(name + " is not aligned to 4 bytes");
    }
    *slot.pointer = data;
  }
  missing_.erase(name);
}

void Model::check_complete() const {
  if (missing_.empty()) return;
  throw std::invalid_argument(std::to_string(missing_.size()) + " tensors are missing, " +
                              missing_.begin()->first + " among them");
}

const Ternary& Model::linear(const std::string& name) const {
  const auto found = linears_.find(name);
  if (found == linears_.end()) throw std::invalid_argument("no ternary linear " + name);
  return *found->second;
}

size_t Model::scratch_bytes() const {
  size_t bytes = states_.size() + x_.size() + g_.size() + h_.size() + y_.size() +
                 thread_floats_.size() + thread_bytes_.size();
  const FffWork& work = fff_work_;
  for (const Scratch* part : {&work.prepared, &work.steps, &work.sums, &work.logits, &work.rows,
                              &work.order, &work.keys, &work.threads}) {
    bytes += part->size();
  }
  for (const Input& input : inputs_) {
    bytes += input.q.size() + input.prepared.size() + input.scale.size();
  }
  return bytes;
}

// After fork only the calling thread exists: the pool's threads are gone, and a mutex that another
// thread held stays locked. Both are replaced, the old ones leaked on purpose.
void Model::own_process() {
  if (getpid() == owner_) return;
  ThreadPool::abandon(std::move(pool_));
  (void)mutex_.release();
  mutex_.reset(new std::mutex);
  pool_.reset(new ThreadPool(threads_));
  owner_ = getpid();
}

void Model::embed(int32_t id, float* x) const {
  const int D = spec_.hidden;
  const size_t at = static_cast<size_t>(id) * D;
  if (spec_.embedding == DType::kF32) {
    std::memcpy(x, static_cast<const float*>(embedding_) + at, sizeof(float) * D);
    return;
  }
  if (spec_.embedding == DType::kI8) {
    const int8_t* row = static_cast<const int8_t*>(embedding_) + at;
    const float scale = embedding_scale_[id];
    for (int d = 0; d < D; ++d) x[d] = static_cast<float>(row[d]) * scale;
    return;
  }
  const uint8_t* row = static_cast<const uint8_t*>(embedding_) + 2 * at;
  for (int d = 0; d < D; ++d) {
    uint16_t half;
    std::memcpy(&half, row + 2 * d, 2);
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    std::memcpy(x + d, &bits, 4);
  }
}

void Model::step(const std::vector<Sequence>& sequences, Want want, float* logits,
                 const std::function<void()>& poll) {
  std::lock_guard<std::mutex> lock(*mutex_);
  size_t total = 0;
  for (const Sequence& sequence : sequences) {
    for (int t = 0; t < sequence.count; ++t) {
      if (sequence.ids[t] >= 0 && sequence.ids[t] < spec_.vocab) continue;
      throw std::invalid_argument("token id " + std::to_string(sequence.ids[t]) +
                                  " is out of range: this model has ids 0 to " +
                                  std::to_string(spec_.vocab - 1));
    }
    total += sequence.count;
  }
  if (total != 1 || threads_ == 1) {
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
  const int D = spec_.hidden;
  const size_t state_floats = static_cast<size_t>(spec_.layers) * D;
  // The layers work on copies, so that a step that fails leaves every sequence as it was.
  float* states = states_.need<float>(sequences.size() * state_floats);
  for (size_t s = 0; s < sequences.size(); ++s) {
    std::memcpy(states + s * state_floats, sequences[s].state, state_floats * sizeof(float));
  }

  size_t s = 0;
  int t = 0;
  std::vector<int> rows;  // tokens of the chunk whose logits are asked for
  for (size_t done = 0; done < total;) {
    const int tokens = static_cast<int>(std::min<size_t>(spec_.chunk, total - done));
    begin(tokens);
    rows.clear();
    for (int c = 0; c < tokens; ++c) {
      while (t == sequences[s].count) ++s, t = 0;
      embed(sequences[s].ids[t], x_.need<float>(0) + static_cast<size_t>(c) * D);
      token_state_[c] = states + s * state_floats;
      ++t;
      if (want == Want::kAll || (want == Want::kLast && t == sequences[s].count)) {
        rows.push_back(c);
      }
    }
    for (int l = 0; l < spec_.layers; ++l) {
      run_layer(l, tokens);
      if (tokens > 1) poll();
    }
    if (!rows.empty()) {
      head(rows.data(), static_cast<int>(rows.size()), logits);
      logits += rows.size() * static_cast<size_t>(spec_.vocab);
    }
    done += tokens;
    poll();
  }
  for (size_t i = 0; i < sequences.size(); ++i) {
    std::memcpy(sequences[i].state, states + i * state_floats, state_floats * sizeof(float));
  }
}

void Model::block(int layer, float* x, int tokens, float* state) {
  std::lock_guard<std::mutex> lock(*mutex_);
  const size_t D = spec_.hidden;
  float* states = states_.need<float>(spec_.layers * D);
  std::memcpy(states + layer * D, state, D * sizeof(float));
  for (int done = 0; done < tokens; done += spec_.chunk) {
    const int count = std::min(spec_.chunk, tokens - done);
    begin(count);
    float* chunk = x_.need<float>(0);
    std::memcpy(chunk, x + done * D, count * D * sizeof(float));
    for (int c = 0; c < count; ++c) token_state_[c] = states;
    run_layer(layer, count);
    std::memcpy(x + done * D, chunk, count * D * sizeof(float));
  }
  std::memcpy(state, states + layer * D, D * sizeof(float));
}

void Model::logits_of(const float* x, int tokens, float* logits) {
  std::lock_guard<std::mutex> lock(*mutex_);
  const size_t D = spec_.hidden;
  std::vector<int> rows;
  for (int done = 0; done < tokens; done += spec_.chunk) {
    const int count = std::min(spec_.chunk, tokens - done);
    begin(count);
    std::memcpy(x_.need<float>(0), x + done * D, count * D * sizeof(float));
    rows.resize(count);
    for (int c = 0; c < count; ++c) rows[c] = c;
    head(rows.data(), count, logits + static_cast<size_t>(done) * spec_.vocab);
  }
}

void Model::accumulate(const std::string& name, const int8_t* q, int tokens, int32_t* acc) {
  const Ternary& linear = this->linear(name);
  Block prepared(kernels_->prepared_bytes(spec_.packing, tokens, linear.k));
  Block scratch(kernels_->scratch_bytes(spec_.packing, tokens, linear.k));
  kernels_->prepare(spec_.packing, q, tokens, linear.k, linear.k, prepared.data());
  kernels_->product(spec_.packing, linear.w, linear.row_bytes, 0, linear.n, prepared.data(), tokens,
                    linear.k, nullptr, acc, linear.n, scratch.data());
}

}  // namespace nomatmul
