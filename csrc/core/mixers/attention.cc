// Softmax attention of encoders, over all tokens of a sequence. q, k and v are stored as one
// linear, in this order. causal_attention.cc has the form of decoders.
#include <algorithm>
#include <cmath>

#include "core/layers.h"

namespace nomatmul {
namespace {

class Attention final : public Mixer {
 public:
  explicit Attention(const MixerParts& parts)
      : size_(parts.hidden), heads_(parts.description.whole("heads", 1, parts.hidden)) {
    if (size_ % heads_ != 0) throw std::invalid_argument("heads do not divide the hidden size");
    Description qkv = parts.description.part("q_proj");
    for (const char* other : {"k_proj", "v_proj"}) {
      qkv.numbers["outputs"] += parts.description.part(other).number("outputs");
    }
    qkv_.declare(qkv, parts.name + ".qkv_proj", parts.isa, parts.tensors);
    parts.declare("o_proj", &o_);
    const auto theta = parts.description.numbers.find("theta");
    if (theta != parts.description.numbers.end()) theta_ = theta->second;
  }

  void reserve(Pass& pass) const override {
    const size_t T = pass.tokens, D = size_;
    pass.a.need<float>(3 * D * T);
    pass.b.need<float>(D * T);
    pass.reserve(qkv_);
    pass.reserve(o_);
    pass.reserve(pass.isa->dense->attention_scratch(longest(pass), size_ / heads_), 0);
  }

  void run(Pass& pass, const Norm& norm) const override {
    float *qkv = pass.a.data<float>(), *mixed = pass.b.data<float>();
    feed_norm(pass, norm, {&qkv_}, "token mixer");
    pass.product(pass.tokens, qkv);
    pass.mark("projections");
    if (theta_ > 0) rotate(pass, qkv);
    core(pass, qkv, mixed);
    pass.mark("attention core");
    pass.add_linear(o_, mixed, "output of the token mixer", pass.row(0));
    pass.mark("projections");
  }

 private:
  static int longest(const Pass& pass) {
    int longest = 1;
    for (const Span& span : pass.spans) longest = std::max(longest, span.count);
    return longest;
  }

  void core(Pass& pass, const float* qkv, float* mixed) const {
    const size_t D = size_, e = D / heads_;
    pass.pool->run(static_cast<int>(pass.spans.size()) * heads_, [&](int task, int thread) {
      const Span& span = pass.spans[task / heads_];
      const size_t first = span.first, column = task % heads_ * e;
      const float* q = qkv + first * 3 * D + column;
      pass.isa->dense->attention(
          q, q + D, q + 2 * D, 3 * D, pass.seen == nullptr ? nullptr : pass.seen + first,
          span.count, static_cast<int>(e), pass.floats(thread), mixed + first * D + column, D);
    });
  }

  // Rotates pairs (i, i + half) of q and k by position * theta^(-i / half), as reference/ops.py
  // does.
  void rotate(Pass& pass, float* qkv) const {
    const int half = size_ / heads_ / 2;
    for (const Span& span : pass.spans) {
      pass.for_tokens(span.count, 2 * size_, [&](int t, int thread) {
        float* row = qkv + static_cast<size_t>(span.first + t) * 3 * size_;
        float *cos = pass.floats(thread), *sin = cos + half;
        for (int i = 0; i < half; ++i) {
          const double angle = t * std::pow(theta_, -static_cast<double>(i) / half);
          cos[i] = static_cast<float>(std::cos(angle));
          sin[i] = static_cast<float>(std::sin(angle));
        }
        for (int head = 0; head < 2 * heads_; ++head, row += 2 * half) {
          for (int i = 0; i < half; ++i) {
            const float first = row[i], second = row[i + half];
            row[i] = first * cos[i] - second * sin[i];
            row[i + half] = second * cos[i] + first * sin[i];
          }
        }
      });
    }
  }

  int size_, heads_;
  Linear qkv_, o_;
  double theta_ = 0;  // 0: no rotary positions
};

}  // namespace

std::unique_ptr<Mixer> make_causal_attention(const MixerParts& parts);

std::unique_ptr<Mixer> make_attention(const MixerParts& parts) {
  if (parts.description.number("causal") != 0) return make_causal_attention(parts);
  return std::make_unique<Attention>(parts);
}

}  // namespace nomatmul
