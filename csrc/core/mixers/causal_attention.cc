// Causal softmax attention over a sequence's pages of keys and values; query heads in groups that
// share a key-value head, a norm on each head of q and k, rotary positions. The bits depend on
// nothing but the sequence (kernels/attention.h has the order of its sums).
#include <algorithm>
#include <cmath>

#include "core/layers.h"

namespace nomatmul {
namespace {

class CausalAttention final : public Mixer {
 public:
  explicit CausalAttention(const MixerParts& parts) {
    const Description& description = parts.description;
    heads_ = description.whole("heads", 1, kMaxElements);
    kv_heads_ = description.whole("kv_heads", 1, heads_);
    size_ = description.whole("head_size", 1, kMaxElements);
    parts.declare("q_proj", &q_);
    parts.declare("k_proj", &k_);
    parts.declare("v_proj", &v_);
    parts.declare("o_proj", &o_);
    if (heads_ % kv_heads_ != 0 || q_.outputs() != heads_ * size_ ||
        k_.outputs() != kv_heads_ * size_ || v_.outputs() != k_.outputs() ||
        o_.inputs() != q_.outputs() || o_.outputs() != parts.hidden) {
      throw std::invalid_argument(parts.name + ": heads and linears do not fit together");
    }
    normed_ = description.has("q_norm");
    if (normed_) {
      q_norm_.declare(description.part("q_norm"), parts.name + ".q_norm", parts.isa, parts.tensors);
      k_norm_.declare(description.part("k_norm"), parts.name + ".k_norm", parts.isa, parts.tensors);
    }
    turns_ = description.has("rotary");
    if (turns_) frequencies_ = Frequencies::of(description.part("rotary"));
    if (turns_ && 2 * frequencies_.inverse.size() != static_cast<size_t>(size_)) {
      throw std::invalid_argument(parts.name + ": as many frequencies as half a head has elements");
    }
    scale_ = static_cast<float>(1.0 / std::sqrt(static_cast<double>(size_)));
  }

  std::vector<StatePiece> state() const override {
    const StatePiece keys{"k", kv_heads_ * size_, true, kv_heads_};
    return {keys, {"v", keys.floats, true, kv_heads_}};
  }

  void reserve(Pass& pass) const override {
    pass.a.need<float>(static_cast<size_t>(pass.tokens) * (q_.outputs() + 2 * k_.outputs()));
    pass.b.need<float>(static_cast<size_t>(pass.tokens) * q_.outputs());
    for (const Linear* linear : {&q_, &k_, &v_, &o_}) pass.reserve(*linear);
    pass.reserve(size_, 0);
  }

  void run(Pass& pass, const Norm& norm) const override {
    const size_t tokens = pass.tokens, wide = q_.outputs(), narrow = k_.outputs();
    float* q = pass.a.data<float>();
    float *k = q + tokens * wide, *v = k + tokens * narrow;
    pass.announce(q_, {q_.row(0)}, q_.outputs(), pass.tokens);
    feed_norm(pass, norm, {&q_, &k_, &v_}, "token mixer");
    const Linear* linears[] = {&q_, &k_, &v_};
    float* outs[] = {q, k, v};
    pass.for_tiles(
        {pass.cut(q_, q_.outputs()), pass.cut(k_, k_.outputs()), pass.cut(v_, v_.outputs())},
        [&](int which, int row, int rows, int first, int m, int thread) {
          const size_t n = linears[which]->outputs();
          pass.tile(pass.inputs[which], row, rows, first, m, outs[which] + first * n + row, n,
                    thread);
        });
    pass.mark("projections");
    keep(pass, q, k, v);
    pass.check_finite("keys and values");
    attend(pass, q, pass.b.data<float>());
    pass.mark("attention core");
    pass.add_linear(o_, pass.b.data<float>(), "output of the token mixer", pass.row(0));
    pass.mark("projections");
  }

 private:
  // Norms and turns the heads of q and k in place, and puts k and v into the pages.
  void keep(Pass& pass, float* q, float* k, const float* v) const {
    if (turns_) {
      pass.rotary.fill(frequencies_, pass.tokens, [&](int t) { return pass.position(t); });
    }
    const size_t wide = q_.outputs(), narrow = k_.outputs();
    pass.for_tokens(pass.tokens, q_.outputs() + 2 * k_.outputs(), [&](int t, int thread) {
      heads(pass, t, q + t * wide, heads_, q_norm_, thread);
      heads(pass, t, k + t * narrow, kv_heads_, k_norm_, thread);
      const Stretch& stretch = pass.stretch(t);
      const int position = stretch.position + t - stretch.first;
      const PageLayout& layout = stretch.pages->layout();
      for (int head = 0; head < kv_heads_; ++head) {
        const size_t at = t * narrow + head * size_;
        if (!pass.isa->attention->keep(layout.strip,
                                       stretch.pages->strip(position, pass.paged_layer, head),
                                       position % kPagePositions, k + at, v + at)) {
          pass.poison();
        }
      }
    });
  }

  void heads(Pass& pass, int token, float* row, int count, const Norm& norm, int thread) const {
    for (int head = 0; head < count; ++head, row += size_) {
      if (normed_) {
        float* normed = pass.floats(thread);
        norm.apply(row, normed);
        std::copy(normed, normed + size_, row);
      }
      if (turns_) pass.rotary.turn(token, row);
    }
  }

  // Some tokens of a sequence and some query heads of one kv head: rows that read the same pages.
  struct Task {
    const Stretch* stretch;
    int kv_head, head, heads, token, tokens;
  };

  std::vector<Task> tasks(const Pass& pass) const {
    const int group = heads_ / kv_heads_, count = static_cast<int>(pass.stretches.size());
    // Of one token a sequence: kv heads that are left over when each thread has as many as the
    // others are shared by threads, query head by query head.
    const int rest = pass.tokens == count ? count * kv_heads_ % pass.threads : 0;
    const int parts = rest == 0 ? 1 : std::min(group, (pass.threads + rest - 1) / rest);
    int whole = count * kv_heads_ - rest;
    std::vector<Task> found;
    for (const Stretch& stretch : pass.stretches) {
      for (int kv = 0; kv < kv_heads_; ++kv, --whole) {
        const int most = whole > 0 ? group : (group + parts - 1) / parts;
        const int heads = std::min(most, kMaxAttentionRows);
        const int tokens = kMaxAttentionRows / heads;
        // the longest first: they take most time
        for (int end = stretch.count; end > 0; end -= tokens) {
          const int first = std::max(0, end - tokens);
          for (int h = 0; h < group; h += heads) {
            found.push_back(
                {&stretch, kv, kv * group + h, std::min(heads, group - h), first, end - first});
          }
        }
      }
    }
    return found;
  }

  void attend(Pass& pass, const float* q, float* out) const {
    int longest = 1;
    for (const Stretch& s : pass.stretches) longest = std::max(longest, s.position + s.count);
    const StripLayout& layout = pass.stretches[0].pages->layout().strip;
    longest = static_cast<int>(round_up(longest, 1024));  // not a little more at each step
    pass.reserve(attention_scratch(layout, kMaxAttentionRows, longest), 0);
    const std::vector<Task> all = tasks(pass);
    pass.pool->run(static_cast<int>(all.size()), [&](int index, int thread) {
      const Task& task = all[index];
      const size_t wide = q_.outputs();
      const float* queries[kMaxAttentionRows];
      float* outs[kMaxAttentionRows];
      int lengths[kMaxAttentionRows], rows = 0;
      for (int t = task.token; t < task.token + task.tokens; ++t) {
        for (int head = task.head; head < task.head + task.heads; ++head, ++rows) {
          const size_t at = (task.stretch->first + t) * wide + head * size_;
          queries[rows] = q + at;
          outs[rows] = out + at;
          lengths[rows] = task.stretch->position + t + 1;
        }
      }
      const Pages& pages = *task.stretch->pages;
      pass.isa->attention->attend({layout, pages.addresses().data(),
                                   pages.layout().offset(pass.paged_layer, task.kv_head), rows,
                                   queries, outs, lengths, scale_, pass.floats(thread)});
    });
  }

  int heads_ = 0, kv_heads_ = 0, size_ = 0;
  float scale_ = 0;
  Linear q_, k_, v_, o_;
  bool normed_ = false, turns_ = false;
  Norm q_norm_, k_norm_;
  Frequencies frequencies_;
};

}  // namespace

std::unique_ptr<Mixer> make_causal_attention(const MixerParts& parts) {
  return std::make_unique<CausalAttention>(parts);
}

}  // namespace nomatmul
