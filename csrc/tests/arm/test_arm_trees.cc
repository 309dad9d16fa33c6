// Conditional layers on every instruction set that runs here against the scalar one: random rows of
// each form, odd sizes, bit for bit. Part of test_arm.cc.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "core/channels/fff.h"

namespace nomatmul {
namespace {

std::mt19937 random_bits(11);
std::normal_distribution<float> normal(0.0f, 1.0f);

struct Result {
  std::vector<float> y, logits;
  std::vector<int32_t> rows;
};

std::vector<float> random_floats(size_t count) {
  std::vector<float> values(count);
  for (float& value : values) value = normal(random_bits);
  return values;
}

std::vector<uint8_t> random_rows(FffForm form, size_t rows, int k) {
  const size_t values = 2 * rows * k;
  std::vector<uint8_t> bytes;
  if (form == FffForm::kTernary) {
    bytes.resize(2 * rows * row_bytes_of(Packing::kTwoBit, k));
    for (uint8_t& byte : bytes) {
      byte = 0;
      for (int code = 0; code < 8; code += 2) byte |= random_bits() % 3 << code;
    }
  } else if (form == FffForm::kInt8) {
    bytes.resize(values);
    for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random_bits());
  } else {
    const std::vector<float> floats = random_floats(values);
    bytes.resize(values * (form == FffForm::kF32 ? 4 : 2));
    for (size_t i = 0; i < values; ++i) {
      const char* from = reinterpret_cast<const char*>(&floats[i]);
      if (form == FffForm::kF32) {
        std::memcpy(&bytes[4 * i], from, 4);
      } else {
        std::memcpy(&bytes[2 * i], from + 2, 2);  // the upper half, both machines little-endian
      }
    }
  }
  return bytes;
}

Result run(const FffSpec& spec, const Isa& isa, const std::vector<float>& x, int tokens) {
  const FffLayer layer(spec, isa);
  const size_t visits = static_cast<size_t>(tokens) * layer.active();
  Result result{std::vector<float>(x.size()), std::vector<float>(visits),
                std::vector<int32_t>(visits)};
  ThreadPool pool(2);
  FffWork work;
  layer.forward(x.data(), tokens, result.y.data(), result.rows.data(), result.logits.data(), pool,
                work);
  return result;
}

bool same(const std::vector<float>& a, const std::vector<float>& b) {
  return std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

void compare(const Isa& isa, const Isa& scalar, FffForm form, int k, int trees, int depth,
             int tokens) {
  const size_t rows = static_cast<size_t>(fff_rows(trees, depth));
  const std::vector<uint8_t> weights = random_rows(form, rows, k);
  std::vector<float> scales = random_floats(2 * rows), bias = random_floats(rows);
  const std::vector<float> norms = random_floats(rows + k), x = random_floats(size_t(tokens) * k);
  FffSpec spec;
  spec.form = form, spec.hidden = k, spec.trees = trees, spec.depth = depth;
  spec.activation = static_cast<Activation>(random_bits() % 3);
  spec.rows = weights.data(), spec.scales = scales.data();
  spec.norm_in = norms.data(), spec.norm_out = norms.data() + k;
  if (form != FffForm::kTernary) spec.bias = bias.data();
  const Result ours = run(spec, isa, x, tokens), theirs = run(spec, scalar, x, tokens);
  if (ours.rows == theirs.rows && same(ours.logits, theirs.logits) && same(ours.y, theirs.y)) {
    return;
  }
  std::printf("%s differs from scalar: layer of form %d, %d wide, %d x %d, %d tokens\n", isa.name,
              static_cast<int>(form), k, trees, depth, tokens);
  std::exit(1);
}

}  // namespace

void compare_trees(const Isa& isa, const Isa& scalar) {
  for (int form = 0; form < 4; ++form) {
    for (const int k : {1, 7, 64, 100, 129, 768}) {
      for (const int trees : {1, 3, 20}) {
        compare(isa, scalar, static_cast<FffForm>(form), k, trees, 3, 19);
        compare(isa, scalar, static_cast<FffForm>(form), k, trees, 0, 1);
      }
    }
  }
}

}  // namespace nomatmul
