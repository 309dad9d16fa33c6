// What a model is, apart from computing it: its parts and their tensors. Nothing here changes once
// the tensors are set, so models of the same weights (with other threads) share one.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "core/embedding.h"
#include "core/layers.h"

namespace nomatmul {

struct Graph {
  Graph(const Description& description, const Isa& isa);
  Graph(const Graph&) = delete;

  struct Layer {
    Norm mixer_norm, channel_norm;
    std::unique_ptr<Mixer> mixer, channel;
  };

  const Isa& isa;
  const int hidden;
  bool causal = true;
  int chunk = 256;
  int positions = 0;  // the longest sequence where keys and values are kept
  StateLayout state;
  Tensors tensors;  // of the packed directory's names, to be set before the first step
  std::map<std::string, const Linear*> linears;
  Embedding embedding;
  std::vector<std::unique_ptr<Layer>> layers;
  Norm final_norm;
  std::unique_ptr<Linear> head;

 private:
  void declare_layer(const Description& description, int layer);
};

}  // namespace nomatmul
