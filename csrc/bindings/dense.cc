// nomatmul._native.encoder: the encoder's kernels over numpy arrays, spread over threads. Every
// shape is checked here; long calls run without the GIL.

#include <algorithm>
#include <atomic>
#include <climits>
#include <cmath>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings/common.h"
#include "core/memory.h"
#include "core/shared_pool.h"
#include "kernels/dense.h"
#include "kernels/ternary.h"

namespace nomatmul {

namespace {

using Table = Out<float, 2>;
using Vector = In<float, 1>;
using ConstTable = In<float, 2>;
using Offsets = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Flags = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Weights = nb::ndarray<const int8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Panels = nb::ndarray<const int8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

constexpr int kRowChunk = 132;  // tokens of one task of a product, at most: they fit a core's L2
constexpr int kTasks = 32;    // of a product and thread: at its end a thread waits for half a task
constexpr int kRowStep = 12;  // a multiple of what every kernel takes at once

void add_norm(Table x, std::optional<ConstTable> delta, Vector weight, std::optional<Vector> bias,
              float eps, Table out, int threads, std::optional<std::string> isa) {
  const int rows = checked_int(x.shape(0), "size"), d = checked_int(x.shape(1), "size");
  require(d >= 1 && out.shape(0) == x.shape(0) && out.shape(1) == x.shape(1), "out is like x");
  require(!delta || (delta->shape(0) == x.shape(0) && delta->shape(1) == x.shape(1)),
          "delta is like x");
  require(weight.shape(0) == x.shape(1), "weight has a value for each column of x");
  require(!bias || bias->shape(0) == x.shape(1), "bias has a value for each column of x");
  require(out.data() != x.data(), "out must not be x");
  const DenseKernels* kernels = isa_of(isa).dense;
  SharedPools& pool = SharedPools::get();
  std::atomic<bool> finite{true};
  {
    const float* add = delta ? delta->data() : nullptr;
    const float* shift = bias ? bias->data() : nullptr;
    nb::gil_scoped_release release;
    const int step = 32, tasks = (rows + step - 1) / step;
    pool.run(checked_threads(threads), tasks, [&](int task, int) {
      for (int t = task * step; t < std::min(rows, (task + 1) * step); ++t) {
        const size_t at = static_cast<size_t>(t) * d;
        if (!kernels->add_norm(x.data() + at, add != nullptr ? add + at : nullptr, weight.data(),
                               shift, eps, d, out.data() + at)) {
          finite = false;
        }
      }
    });
  }
  if (!finite) throw std::invalid_argument("a value inside the model is not finite");
}

void activate(Table x, const std::string& kind, int threads, std::optional<std::string> isa) {
  const DenseKernels* kernels = isa_of(isa).dense;
  const Activation activation = activation_of(kind);
  SharedPools& pool = SharedPools::get();
  nb::gil_scoped_release release;
  const size_t count = x.size(), step = 1 << 14;
  pool.run(
      checked_threads(threads), static_cast<int>((count + step - 1) / step), [&](int task, int) {
        kernels->activate(activation, x.data() + task * step, std::min(step, count - task * step));
      });
}

void attention(ConstTable qkv, Offsets offsets, std::optional<Flags> seen, int heads, Table out,
               int threads, std::optional<std::string> isa) {
  const size_t n = out.shape(0), d = out.shape(1);
  require(heads >= 1 && checked_int(3 * d, "size") >= 3 && d % heads == 0,
          "heads divide the columns of out");
  require(qkv.shape(0) == n && qkv.shape(1) == 3 * d, "qkv is [tokens, 3 * columns of out]");
  require(!seen || seen->shape(0) == n, "seen has a value for each token");
  require(offsets.shape(0) >= 1 && offsets.data()[0] == 0, "offsets begin with 0");
  const int sequences = checked_int(offsets.shape(0), "size") - 1;
  const int64_t* at = offsets.data();
  int64_t longest = 0;
  for (int b = 0; b < sequences; ++b) {
    require(at[b + 1] > at[b], "offsets rise: no sequence is empty");
    longest = std::max(longest, at[b + 1] - at[b]);
  }
  require(static_cast<size_t>(at[sequences]) == n && longest < (1 << 24), "offsets end at tokens");
  const int tasks = checked_int(static_cast<size_t>(sequences) * heads, "size");
  const DenseKernels* kernels = isa_of(isa).dense;
  const int e = static_cast<int>(d) / heads, count = checked_threads(threads);
  SharedPools& pool = SharedPools::get();
  nb::gil_scoped_release release;
  const size_t floats = kernels->attention_scratch(static_cast<int>(longest), e);
  const std::unique_ptr<float[]> scratch(new float[floats * count]);
  pool.run(count, tasks, [&](int task, int thread) {
    const int64_t first = at[task / heads];
    const size_t column = static_cast<size_t>(task % heads) * e;
    const float* q = qkv.data() + first * 3 * d + column;
    kernels->attention(q, q + d, q + 2 * d, 3 * d, seen ? seen->data() + first : nullptr,
                       static_cast<int>(at[task / heads + 1] - first), e,
                       scratch.get() + thread * floats, out.data() + first * d + column, d);
  });
}

// How a product is cut into tasks: chunks of rows times groups of panels.
struct Tiling {
  int rows, chunk, chunks, panels, groups;

  Tiling(int rows, int panels, int workers) : rows(rows), panels(panels) {
    const int least = std::max(1, (rows + kRowChunk - 1) / kRowChunk);
    chunk = (rows + least * kRowStep - 1) / (least * kRowStep) * kRowStep;
    chunks = (rows + chunk - 1) / std::max(1, chunk);
    groups =
        workers == 1 ? 1 : std::min(panels, std::max(1, kTasks * workers / std::max(1, chunks)));
  }
  int tasks() const { return chunks * groups; }
  int first_row(int task) const { return task / groups * chunk; }
  int row_count(int task) const { return std::min(chunk, rows - first_row(task)); }
  int first_panel(int task) const { return panels * (task % groups) / groups; }
  int last_panel(int task) const { return panels * (task % groups + 1) / groups; }
};

nb::ndarray<nb::numpy, float> float_panels_of(ConstTable weight, std::optional<std::string> isa) {
  const size_t m = weight.shape(0), k = weight.shape(1);
  require(m >= 1 && k >= 1, "a weight has rows and columns");
  const size_t columns = isa_of(isa).dense->columns, count = (m + columns - 1) / columns;
  auto* block = new Block(count * k * columns * sizeof(float));  // zeros, in huge pages
  nb::capsule owner(block, [](void* p) noexcept { delete static_cast<Block*>(p); });
  float* data = block->as<float>();
  const float* from = weight.data();
  for (size_t j = 0; j < m; ++j) {
    float* panel = data + j / columns * k * columns + j % columns;
    for (size_t i = 0; i < k; ++i) panel[i * columns] = from[j * k + i];
  }
  return nb::ndarray<nb::numpy, float>(data, {count * k * columns}, owner);
}

void linear_f32(ConstTable x, Vector panels, Table out, int threads,
                std::optional<std::string> isa) {
  const DenseKernels* kernels = isa_of(isa).dense;
  const int rows = checked_int(x.shape(0), "size"), k = checked_int(x.shape(1), "size");
  const int m = checked_int(out.shape(1), "size");
  const int count = (m + kernels->columns - 1) / kernels->columns;
  require(k >= 1 && m >= 1 && out.shape(0) == x.shape(0), "out is [n, m]");
  require(panels.shape(0) == static_cast<size_t>(count) * k * kernels->columns,
          "panels do not fit");
  SharedPools& pool = SharedPools::get();
  nb::gil_scoped_release release;
  const Tiling tiling(rows, count, checked_threads(threads));
  pool.run(threads, tiling.tasks(), [&](int task, int) {
    const size_t t = tiling.first_row(task);
    kernels->float_product(x.data() + t * k, k, tiling.row_count(task), k, panels.data(),
                           tiling.first_panel(task), tiling.last_panel(task), m, out.data() + t * m,
                           m);
  });
}

nb::ndarray<nb::numpy, int8_t> panels_of(Weights weight, std::optional<std::string> isa) {
  const size_t m = weight.shape(0), k = weight.shape(1);
  require(m >= 1 && k >= 1, "a weight has rows and columns");
  const size_t columns = isa_of(isa).dense->columns;
  const size_t pairs = (k + 1) / 2, count = (m + columns - 1) / columns;
  auto* block = new Block(count * pairs * 2 * columns);
  nb::capsule owner(block, [](void* p) noexcept { delete static_cast<Block*>(p); });
  auto* data = block->as<int8_t>();
  const int8_t* from = weight.data();
  for (size_t j = 0; j < m; ++j) {
    int8_t* panel = data + j / columns * pairs * 2 * columns + j % columns * 2;
    for (size_t i = 0; i < k; ++i) panel[i / 2 * 2 * columns + i % 2] = from[j * k + i];
  }
  return nb::ndarray<nb::numpy, int8_t>(data, {count * pairs * 2 * columns}, owner);
}

// q = the absmax quantiser of docs/numerics.md by token; out = x W^T through int32.
void linear_int8(ConstTable x, Panels panels, Vector row_scale, Table out, int threads,
                 std::optional<std::string> isa) {
  const Isa& found = isa_of(isa);
  const int rows = checked_int(x.shape(0), "size"), k = checked_int(x.shape(1), "size");
  const int m = checked_int(out.shape(1), "size"), columns = found.dense->columns;
  require(out.shape(0) == x.shape(0) && row_scale.shape(0) == out.shape(1), "out is [n, m]");
  // 127 * 127 * k must not leave int32
  require(k >= 1 && k <= 131072 && m >= 1, "a weight has 1 to 131072 columns");
  const size_t ldq = static_cast<size_t>(k + 1) / 2 * 2;
  const int count = (m + columns - 1) / columns;
  require(panels.shape(0) == static_cast<size_t>(count) * ldq * columns, "panels do not fit");
  SharedPools& pool = SharedPools::get();
  std::atomic<bool> finite{true};
  {
    nb::gil_scoped_release release;
    const int workers = checked_threads(threads);
    std::vector<int16_t> q(ldq * rows);
    std::vector<float> step(rows);
    const std::vector<float> ones(k, 1.0f);
    std::vector<int8_t> buffers(static_cast<size_t>(k) * workers);  // here: a task must not throw
    pool.run(workers, (rows + 15) / 16, [&](int task, int thread) {
      int8_t* narrow = buffers.data() + static_cast<size_t>(k) * thread;
      for (int t = task * 16; t < std::min(rows, task * 16 + 16); ++t) {
        step[t] = found.ternary->scale_quantize(x.data() + static_cast<size_t>(t) * k, ones.data(),
                                                k, narrow);
        if (!std::isfinite(step[t])) finite = false;
        std::copy(narrow, narrow + k, q.begin() + t * ldq);
      }
    });
    const Tiling tiling(rows, count, workers);
    pool.run(workers, tiling.tasks(), [&](int task, int) {
      const size_t t = tiling.first_row(task);
      found.dense->product(q.data() + t * ldq, ldq, tiling.row_count(task), k, panels.data(),
                           tiling.first_panel(task), tiling.last_panel(task), m, row_scale.data(),
                           step.data() + t, out.data() + t * m, m);
    });
  }
  if (!finite) throw std::invalid_argument("a value inside the model is not finite");
}

}  // namespace

void bind_dense(nb::module_& parent) {
  nb::module_ m = parent.def_submodule("encoder", "Steps of the encoder engine");
  // Outputs are never converted: results would go into the copy.
  m.def("add_norm", &add_norm, "x"_a.noconvert(), "delta"_a.none(), "weight"_a, "bias"_a.none(),
        "eps"_a, "out"_a.noconvert(), "threads"_a = 1, "isa"_a = nb::none(),
        "x += delta; out = layer norm of x (with a bias) or RMS norm (without).");
  m.def("activate", &activate, "x"_a.noconvert(), "kind"_a, "threads"_a = 1, "isa"_a = nb::none(),
        "x = gelu, silu or relu of x.");
  m.def("attention", &attention, "qkv"_a, "offsets"_a, "seen"_a.none(), "heads"_a,
        "out"_a.noconvert(), "threads"_a = 1, "isa"_a = nb::none(),
        "out = softmax(q k^T / sqrt(e)) v of each sequence offsets[b]..offsets[b + 1].");
  m.def("float_panels", &float_panels_of, "weight"_a, "isa"_a = nb::none(),
        "A float32 matrix [m, k] in the layout that linear_f32 reads.");
  m.def("linear_f32", &linear_f32, "x"_a, "panels"_a, "out"_a.noconvert(), "threads"_a = 1,
        "isa"_a = nb::none(), "out = x W^T; a row's result does not depend on the other rows.");
  m.def("panels", &panels_of, "weight"_a, "isa"_a = nb::none(),
        "An int8 matrix [m, k] in the layout that linear_int8 reads.");
  m.def("linear_int8", &linear_int8, "x"_a, "panels"_a, "row_scale"_a, "out"_a.noconvert(),
        "threads"_a = 1, "isa"_a = nb::none(),
        "out = x W^T, x quantised to int8 by token, sums exact.");
}

}  // namespace nomatmul
