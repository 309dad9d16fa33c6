#include "core/graph.h"

namespace nomatmul {

Graph::Graph(const Description& description, const Isa& isa)
    : isa(isa), hidden(description.part("embedding").whole("hidden", 1, kMaxElements)) {
  causal = description.number("causal") != 0;
  chunk = description.whole("chunk", 1, 65536);
  if (causal) {
    state = StateLayout(kv_form_of(description.word("kv")));
    positions = description.whole("positions", 1, INT32_MAX);
  }
  embedding.declare(description.part("embedding"), isa, tensors);
  const Description& parts = description.part("layers");
  for (int layer = 0; layer < parts.whole("count", 1, 65536); ++layer) {
    declare_layer(parts.part(std::to_string(layer)), layer);
  }
  final_norm.declare(description.part("final_norm"), "final_norm", isa, tensors);
  if (!description.has("head")) return;
  head = std::make_unique<Linear>();
  head->declare(description.part("head"), "head", isa, tensors);
  if (description.part("head").flag("tied")) embedding.tie(head.get());
  linears["head"] = head.get();
}

void Graph::declare_layer(const Description& description, int layer) {
  const std::string at = "layers." + std::to_string(layer) + ".";
  auto made = std::make_unique<Layer>();
  const auto mixer = [&](const char* name, Norm* norm) {
    const std::string norm_name = std::string(name) + "_norm";
    norm->declare(description.part(norm_name), at + norm_name, isa, tensors);
    return make_mixer({description.part(name), at + name, hidden, isa, tensors, linears});
  };
  made->mixer = mixer("mixer", &made->mixer_norm);
  if (description.has("channel")) made->channel = mixer("channel", &made->channel_norm);
  state.add(at + "mixer (" + description.part("mixer").kind + ")", made->mixer->state());
  layers.push_back(std::move(made));
}

}  // namespace nomatmul
