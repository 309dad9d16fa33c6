// The AVX512-VNNI table: vectors.h for few tokens, register tiles of 32 rows x 12 tokens for more.
#include "kernels/ternary.h"
#include "kernels/avx512vnni/vectors.h"
#include "kernels/common/float_ops.h"

namespace nomatmul {
namespace {

struct Avx512 : Vectors {
  static constexpr int kTileTokens = 12, kPanelVectors = 2, kRun = kMaxElements;
  static constexpr int passes(Packing packing) { return packing == Packing::kTwoBit ? 2 : 1; }
  static constexpr int block_of(Packing) { return 4; }  // 32 rows: 32 or 40 KB

  NOMATMUL_INLINE static void transpose(V (&rows)[16]) { nomatmul::transpose(rows); }
  NOMATMUL_INLINE static void fetch_line(const uint8_t* p) { nomatmul::fetch_ahead<0>(p); }
  NOMATMUL_INLINE static V four(const uint8_t* p) {
    int32_t word;
    std::memcpy(&word, p, sizeof word);
    return _mm512_set1_epi32(word);
  }
  NOMATMUL_INLINE static void add_lanes(int32_t* c, Sum sum) {
    nomatmul::store(c, _mm512_add_epi32(nomatmul::load(c), sum));
  }
};

}  // namespace

const TernaryKernels kAvx512VnniTernary = NOMATMUL_TERNARY(PlaneProducts<Avx512>);

}  // namespace nomatmul
