// The use of AMX's tiles for the length of a product.
#pragma once

#include <cstdint>

#include "kernels/avx512vnni/intrinsics.h"

#include "kernels/common/unroll.h"

namespace nomatmul {
namespace {

// GCC's tile intrinsics do not say that they read memory, so without this it may keep a store back
// until after the load that needs it.
NOMATMUL_INLINE inline void publish(const void* written) {
  __asm__ volatile("" : : "r"(written) : "memory");
}

// Tiles 0..3 hold C, 4 and 5 A, 6 and 7 B: 16 rows of 64 bytes, but of A `depth` bytes and of B
// `depth` / 4 rows.
class TileSession {
 public:
  explicit TileSession(int depth = 64) {
    alignas(64) uint8_t config[64] = {};
    config[0] = 1;  // palette
    for (int tile = 0; tile < 8; ++tile) {
      config[16 + 2 * tile] = 64;
      config[48 + tile] = 16;
    }
    if (depth < 64) {  // apart, so that whole tiles cost nothing to set up
      config[16 + 2 * 4] = config[16 + 2 * 5] = static_cast<uint8_t>(depth);
      config[48 + 6] = config[48 + 7] = static_cast<uint8_t>(depth / 4);
    }
    publish(config);
    _tile_loadconfig(config);
  }
  ~TileSession() { _tile_release(); }
  TileSession(const TileSession&) = delete;
  TileSession& operator=(const TileSession&) = delete;
};

}  // namespace
}  // namespace nomatmul
