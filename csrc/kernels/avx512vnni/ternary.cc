// The AVX512-VNNI table: vectors.h for few tokens, register tiles of 4 rows x 6 tokens for more.
#include "kernels/ternary.h"
#include "kernels/avx512vnni/vectors.h"
#include "kernels/common/float_ops.h"

namespace nomatmul {
namespace {

struct Avx512 : Vectors {
  static constexpr int kTileTokens = 6, kPanel = 8;
  static constexpr int kMaxBlockSteps = 40;  // 8 rows x 2560 codes + 6 tokens of q: 35 KB of L1
  static constexpr int kTokenBlockBytes = 512 * 1024;
  static constexpr int block_of(Packing packing) { return kMaxBlockSteps / planes_of(packing); }

  NOMATMUL_INLINE static V load_packed(const uint8_t* p, size_t left) {
    nomatmul::fetch_ahead<4096>(p);
    return load_part(p, left);
  }
};

}  // namespace

const TernaryKernels kAvx512VnniTernary = NOMATMUL_TERNARY(PlaneProducts<Avx512>);

}  // namespace nomatmul
