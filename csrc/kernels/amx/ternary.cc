// AMX-int8: tiles of 16 rows x 64 bytes. Weights are the A operand (16 rows of w, 64 codes each,
// unpacked into scratch), activations the B operand (laid out by prepare), C is 16 rows of w x 16
// tokens of int32. Up to four tokens the product reads memory as fast as it can be read without
// tiles: those go through avx512vnni/vectors.h.
#include "kernels/ternary.h"
#include "kernels/amx/session.h"
#include "kernels/amx/unpacking.h"
#include "kernels/common/float_ops.h"

namespace nomatmul {
namespace {

// Tokens whose B tiles should stay in L2 while all rows pass by.
constexpr size_t kTokenBlockBytes = 1280 * 1024;
constexpr int kLeastTokens = 128;

int groups_of(int tokens) { return (tokens + kSide - 1) / kSide; }

int token_block(const PlaneLayout& layout, int m) {
  const int fit = static_cast<int>(kTokenBlockBytes / layout.bytes_per_token) / kPanel * kPanel;
  return at_most(m, fit > kLeastTokens ? fit : kLeastTokens);
}

// --- tiles --------------------------------------------------------------------------------------

NOMATMUL_INLINE inline void zero_c() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

// 32 rows x 32 tokens. C tile 2 * (token half) + (row half). between(): after each step.
template <class Between>
NOMATMUL_INLINE inline void multiply_pair(const uint8_t* a, size_t a_half, const uint8_t* b,
                                          size_t b_half, int steps, Between&& between) {
  for (int step = 0; step < steps; ++step, a += kTile, b += kTile) {
    _tile_loadd(4, a, kVec);
    _tile_loadd(6, b, kVec);
    _tile_loadd(5, a + a_half, kVec);
    _tile_loadd(7, b + b_half, kVec);
    _tile_dpbusd(0, 4, 6);
    _tile_dpbusd(1, 5, 6);
    _tile_dpbusd(2, 4, 7);
    _tile_dpbusd(3, 5, 7);
    between();
  }
}

// 32 rows x 16 tokens: even steps into C tiles 0 and 1, odd ones into 2 and 3, because two chains
// alone would wait for the product's latency.
template <class Between>
NOMATMUL_INLINE inline void multiply_one(const uint8_t* a, size_t a_half, const uint8_t* b,
                                         int steps, Between&& between) {
  int step = 0;
  for (; step + 2 <= steps; step += 2, a += 2 * kTile, b += 2 * kTile) {
    _tile_loadd(4, a, kVec);
    _tile_loadd(6, b, kVec);
    _tile_loadd(5, a + a_half, kVec);
    _tile_dpbusd(0, 4, 6);
    _tile_dpbusd(1, 5, 6);
    between();
    _tile_loadd(4, a + kTile, kVec);
    _tile_loadd(7, b + kTile, kVec);
    _tile_loadd(5, a + a_half + kTile, kVec);
    _tile_dpbusd(2, 4, 7);
    _tile_dpbusd(3, 5, 7);
    between();
  }
  if (step < steps) {
    _tile_loadd(4, a, kVec);
    _tile_loadd(6, b, kVec);
    _tile_loadd(5, a + a_half, kVec);
    _tile_dpbusd(0, 4, 6);
    _tile_dpbusd(1, 5, 6);
  }
}

NOMATMUL_INLINE inline void load_c(const int32_t* c) {
  _tile_loadd(0, c, kVec);
  _tile_loadd(1, c + kTile / 4, kVec);
  _tile_loadd(2, c + 2 * kTile / 4, kVec);
  _tile_loadd(3, c + 3 * kTile / 4, kVec);
}

NOMATMUL_INLINE inline void store_c(int32_t* c) {
  _tile_stored(0, c, kVec);
  _tile_stored(1, c + kTile / 4, kVec);
  _tile_stored(2, c + 2 * kTile / 4, kVec);
  _tile_stored(3, c + 3 * kTile / 4, kVec);
}

// --- the product --------------------------------------------------------------------------------

// One panel's results for up to 16 tokens from t on, from two C tiles (rows x tokens).
void write_group(const Operands& op, int n, int rows, int t, const int32_t* c) {
  const int tokens = at_most(kSide, op.m - t);
  for (int half = 0; half * kSide < rows; ++half) {
    __m512i lines[kSide];
    unrolled<kSide>([&](auto r)
                        NOMATMUL_INLINE { lines[r] = load(c + half * (kTile / 4) + r * kSide); });
    transpose(lines);
    const int count = at_most(kSide, rows - half * kSide);
    const auto mask = static_cast<uint16_t>((1u << count) - 1);
    unrolled<kSide>([&](auto i) NOMATMUL_INLINE {
      if (i >= tokens) return;
      const __m512i acc = _mm512_sub_epi32(lines[i], _mm512_set1_epi32(op.sums[t + i]));
      const size_t at = static_cast<size_t>(t + i) * op.ldo + static_cast<size_t>(n + half * kSide);
      if (op.token_scale == nullptr) {
        _mm512_mask_storeu_epi32(static_cast<int32_t*>(op.out) + at, mask, acc);
      } else {
        const __m512 scaled =
            _mm512_mul_ps(_mm512_cvtepi32_ps(acc), _mm512_set1_ps(op.token_scale[t + i]));
        _mm512_mask_storeu_ps(static_cast<float*>(op.out) + at, mask, scaled);
      }
    });
  }
}

struct Scratch {
  uint8_t* a[2];  // of this block and the next one: [2 row halves][steps] tiles
  int32_t* c;     // [groups of 16 tokens][2 row halves] tiles; one pair more for multiply_one
};

// A block times all tokens, at most 32: C stays in its tiles from a panel's first block to its
// last.
template <Packing packing>
void multiply_few(const Operands& op, const Block& block, const uint8_t* a, const Scratch& scratch,
                  Unpacking<packing>* unpacking) {
  const int steps = block.count * planes_of(packing),
            share = (unpacking->left() + steps - 1) / steps;
  const size_t a_half = static_cast<size_t>(steps) * kTile;
  const auto* b = reinterpret_cast<const uint8_t*>(op.q) +
                  static_cast<size_t>(block.first) * planes_of(packing) * kTile;
  const auto between = [&]() NOMATMUL_INLINE { unpacking->some(share); };
  const bool pair = op.m > kSide;
  if (block.first == 0) zero_c();
  if (pair) {
    multiply_pair(a, a_half, b, kSide * op.layout.bytes_per_token, steps, between);
  } else {
    multiply_one(a, a_half, b, steps, between);
  }
  if (!block.last(op)) return;
  store_c(scratch.c);
  if (pair) return;
  for (int i = 0; i < 2 * kTile / 4; i += kSide) {
    store(scratch.c + i,
          _mm512_add_epi32(load(scratch.c + i), load(scratch.c + 2 * kTile / 4 + i)));
  }
}

// A block times tokens t0.. : C goes to scratch between blocks.
template <Packing packing>
void multiply_many(const Operands& op, const Block& block, int t0, int tokens, const uint8_t* a,
                   const Scratch& scratch, Unpacking<packing>* unpacking) {
  const int steps = block.count * planes_of(packing), groups = groups_of(tokens);
  const int all = steps * ((groups + 1) / 2), share = (unpacking->left() + all - 1) / all;
  const size_t a_half = static_cast<size_t>(steps) * kTile;
  const size_t group_bytes = kSide * op.layout.bytes_per_token;
  const auto* b = reinterpret_cast<const uint8_t*>(op.q) +
                  static_cast<size_t>(t0 / kSide) * group_bytes +
                  static_cast<size_t>(block.first) * planes_of(packing) * kTile;
  for (int g = 0; g < groups; g += 2, b += 2 * group_bytes) {
    int32_t* c = scratch.c + g * (2 * kTile / 4);
    // an odd last group multiplies itself twice; the second copy is never written out
    const size_t b_half = g + 1 < groups ? group_bytes : 0;
    if (block.first == 0) {
      zero_c();
    } else {
      load_c(c);
    }
    multiply_pair(a, a_half, b, b_half, steps, [&]() NOMATMUL_INLINE { unpacking->some(share); });
    store_c(c);
  }
}

// Tokens t0.. of all rows.
template <Packing packing>
void multiply_rows(const Operands& op, int t0, int tokens, const Scratch& scratch) {
  Block block = Block::at(op, op.n0, 0);
  Unpacking<packing>(op, block, scratch.a[0]).rest();
  for (int turn = 0; block.n < op.n1; turn ^= 1) {
    const Block next = block.next(op);
    Unpacking<packing> unpacking(op, next, scratch.a[turn ^ 1]);
    publish(scratch.a[turn]);
    if (op.m <= 2 * kSide) {
      multiply_few(op, block, scratch.a[turn], scratch, &unpacking);
    } else {
      multiply_many(op, block, t0, tokens, scratch.a[turn], scratch, &unpacking);
    }
    unpacking.rest();
    if (block.last(op)) {
      const int rows = at_most(kPanel, op.n1 - block.n);
      for (int g = 0; g < groups_of(tokens); ++g) {
        write_group(op, block.n, rows, t0 + g * kSide, scratch.c + g * (2 * kTile / 4));
      }
    }
    block = next;
  }
}

// --- the table's functions ----------------------------------------------------------------------

struct Amx : ProductEntry<Amx> {
  static constexpr int kVec = nomatmul::kVec;

  static size_t prepared_bytes(Packing packing, int m, int k) {
    const PlaneLayout layout(packing, kVec, m, k);
    if (m <= Vectors::kFewTokens) return layout.bytes(m);
    return layout.sums_bytes + static_cast<size_t>(groups_of(m)) * kSide * layout.bytes_per_token;
  }

  static void prepare(Packing packing, const int8_t* q, int m, int k, int ldq, void* prepared) {
    if (m <= Vectors::kFewTokens) {
      return prepare_planes<kVec>(packing, q, m, k, ldq, prepared);
    }
    const PlaneLayout layout(packing, kVec, m, k);
    auto* sums = static_cast<int32_t*>(prepared);
    auto* tiles = static_cast<uint8_t*>(prepared) + layout.sums_bytes;
    for (int t = 0; t < m; ++t) sums[t] = sum_of(q + static_cast<size_t>(t) * ldq, k);
    for (int t = 0; t < m; t += kSide, tiles += kSide * layout.bytes_per_token) {
      const int8_t* group = q + static_cast<size_t>(t) * ldq;
      const int tokens = at_most(kSide, m - t);
      if (packing == Packing::kTwoBit) {
        prepare_group<4>(group, tokens, k, static_cast<size_t>(ldq), layout, tiles);
      } else {
        prepare_group<5>(group, tokens, k, static_cast<size_t>(ldq), layout, tiles);
      }
    }
  }

  static size_t scratch_bytes(Packing packing, int m, int k) {
    if (m <= Vectors::kFewTokens) return 0;
    const PlaneLayout layout(packing, kVec, m, k);
    const int pairs = (groups_of(token_block(layout, m)) + 1) / 2;
    return static_cast<size_t>(4 * kMaxSteps + 4 * pairs) * kTile;
  }

  template <Packing packing>
  static void product_of(const Operands& op) {
    if (op.m <= Vectors::kFewTokens) return product_of_few<Vectors, packing>(op);
    const TileSession session;
    auto* a = static_cast<uint8_t*>(op.scratch);
    uint8_t* const c = a + 4 * kMaxSteps * kTile;
    const Scratch scratch{{a, a + 2 * kMaxSteps * kTile}, reinterpret_cast<int32_t*>(c)};
    const int block = token_block(op.layout, op.m);
    for (int t0 = 0; t0 < op.m; t0 += block) {
      multiply_rows<packing>(op, t0, at_most(block, op.m - t0), scratch);
    }
  }
};

}  // namespace

const TernaryKernels kAmxTernary = NOMATMUL_TERNARY(Amx);

}  // namespace nomatmul
