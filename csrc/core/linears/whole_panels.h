// One product of panels in one go, for tests and tools.
#pragma once

#include "core/linears/panel_weights.h"
#include "core/whole_product.h"

namespace nomatmul {

// out [m, rows] of q [m, k] and its steps [m, groups].
inline void whole_panels(const PanelKernels& kernels, const PanelWeights& weights, int rows,
                         const int8_t* q, const float* step, int m, float* out) {
  const PanelShape& shape = weights.shape();
  const int width = panel_width(m), tiles = (m + width - 1) / width;
  const size_t tile_bytes = shape.tile_bytes(width);
  const ExactBuffer prepared(tile_bytes * tiles), scratch(kernels.scratch_bytes(shape, m));
  auto* to = static_cast<uint8_t*>(prepared.data());
  for (int i = 0; i < tiles; ++i) {
    const int first = i * width;
    kernels.prepare(shape, q + static_cast<size_t>(first) * shape.k,
                    step + static_cast<size_t>(first) * shape.groups(), std::min(width, m - first),
                    width, to + i * tile_bytes);
  }
  kernels.product(shape, {weights.panel_of(0), rows, m, width, to, out, static_cast<size_t>(rows),
                          scratch.data()});
}

}  // namespace nomatmul
