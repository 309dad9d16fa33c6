// nomatmul._native.fff: the conditional layer and its training primitives over numpy arrays (or any
// CPU array that speaks DLPack). Every shape is checked here, before a kernel sees a pointer.

#include <algorithm>
#include <chrono>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings/common.h"
#include "core/channels/fff.h"
#include "core/tools.h"

namespace nomatmul {
namespace {

using StoredRows = nb::ndarray<nb::ro, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using Scales = nb::ndarray<const float, nb::c_contig, nb::device::cpu>;

void require_dtype(const StoredRows& rows, FffForm form) {
  const nb::dlpack::dtype wanted = form == FffForm::kF32    ? nb::dtype<float>()
                                   : form == FffForm::kBF16 ? nb::dtype<uint16_t>()
                                   : form == FffForm::kInt8 ? nb::dtype<int8_t>()
                                                            : nb::dtype<uint8_t>();
  require(rows.dtype() == wanted,
          "rows must be float32 (f32), uint16 bits (bf16), int8 (int8) or packed uint8 (ternary)");
}

template <class Array>
void require_length(const std::optional<Array>& array, size_t length, const char* name) {
  if (!array) return;
  require(array->shape(0) == length, std::string(name) + " has " + std::to_string(array->shape(0)) +
                                         " elements, expected " + std::to_string(length));
}

void require_rows(size_t there, int trees, int depth) {
  const int64_t rows = fff_rows(trees, depth);
  require(there == static_cast<size_t>(rows),
          std::to_string(there) + " rows, but " + std::to_string(trees) + " trees of depth " +
              std::to_string(depth) + " have " + std::to_string(rows));
}

bool apart(const float* a, const float* b, size_t count) {
  const std::less_equal<const float*> before;
  return before(a + count, b) || before(b + count, a);
}

class Layer {
 public:
  Layer(const std::string& form, StoredRows rows, int trees, int depth,
        const std::string& activation, std::optional<Scales> scales,
        std::optional<In<float, 1>> bias, std::optional<In<float, 1>> norm_in,
        std::optional<In<float, 1>> norm_out, float eps, int threads, const IsaName& isa)
      : rows_(rows),
        scales_(scales),
        bias_(bias),
        norm_in_(norm_in),
        norm_out_(norm_out),
        threads_(threads),
        isa_(&isa_of(isa)),
        layer_(checked_spec(form, trees, depth, activation, eps), *isa_) {}

  void forward(In<float, 2> x, std::optional<Out<float, 2>> y, std::optional<Out<int32_t, 3>> rows,
               std::optional<Out<float, 3>> logits) {
    const size_t tokens = x.shape(0), hidden = layer_.spec().hidden;
    require(x.shape(1) == hidden, "x has " + std::to_string(x.shape(1)) + " columns, the layer " +
                                      std::to_string(hidden));
    require(!y || (y->shape(0) == tokens && y->shape(1) == hidden), "y must have the shape of x");
    const auto require_visits = [&](const auto& array, const char* name) {
      require(!array || (array->shape(0) == tokens &&
                         array->shape(1) == static_cast<size_t>(layer_.spec().trees) &&
                         array->shape(2) == static_cast<size_t>(layer_.levels())),
              std::string(name) + " must be [tokens, trees, depth + 1]");
    };
    require(!y || apart(x.data(), y->data(), tokens * hidden), "x and y must not overlap");
    require_visits(rows, "rows");
    require_visits(logits, "logits");
    const int count = checked_int(tokens, "tokens");
    const float* from = x.data();
    float* to = pointer_of(y);
    int32_t* path = pointer_of(rows);
    float* values = pointer_of(logits);
    with_pool(threads_, [&](ThreadPool& pool, FffWork& work) {
      layer_.forward(from, count, to, path, values, pool, work);
    });
  }

  // Seconds of each call; layers and inputs in rotation. For benchmarks: without Python's share.
  static std::vector<double> time_forward(const std::vector<Layer*>& layers, In<float, 3> x,
                                          int repeats) {
    require(!layers.empty() && x.shape(0) >= 1, "no layers or no inputs");
    require(repeats >= 1 && repeats <= 1000000, "repeats must be 1 to 1000000");
    const size_t tokens = x.shape(1), hidden = x.shape(2);
    for (const Layer* layer : layers) {
      require(layer != nullptr, "a layer is None");
      require(static_cast<size_t>(layer->layer_.spec().hidden) == hidden &&
                  layer->threads_ == layers[0]->threads_,
              "layers differ in size or threads, or x does not fit");
    }
    const int count = checked_int(tokens, "tokens");
    std::vector<float> y(tokens * hidden);
    std::vector<double> seconds;
    with_pool(layers[0]->threads_, [&](ThreadPool& pool, FffWork& work) {
      for (int r = 0; r < repeats; ++r) {
        const FffLayer& layer = layers[r % layers.size()]->layer_;
        const float* from = x.data() + r % x.shape(0) * tokens * hidden;
        const auto start = std::chrono::steady_clock::now();
        layer.forward(from, count, y.data(), nullptr, nullptr, pool, work);
        const std::chrono::duration<double> spent = std::chrono::steady_clock::now() - start;
        seconds.push_back(spent.count());
      }
    });
    return seconds;
  }

  const char* isa() const { return isa_->name; }
  int threads() const { return threads_; }

 private:
  FffSpec checked_spec(const std::string& form, int trees, int depth, const std::string& activation,
                       float eps) const {
    FffSpec spec;
    spec.form = fff_form_of(form);
    spec.activation = activation_of(activation);
    spec.trees = trees, spec.depth = depth, spec.eps = eps;
    require_dtype(rows_, spec.form);
    require_rows(rows_.shape(0), trees, depth);
    const size_t count = rows_.shape(0), width = rows_.shape(2);
    require(rows_.shape(1) == 2, "rows must be [rows, 2, columns]: input and output weights");
    require(eps >= 0.0f, "eps must not be negative");
    const bool ternary = spec.form == FffForm::kTernary;
    require(!ternary || norm_in_.has_value(), "ternary rows need norm_in and norm_out");
    spec.hidden = checked_int(ternary ? norm_in_->shape(0) : width, "hidden");
    require(spec.hidden >= 1, "rows have no columns");
    if (ternary) {
      require(width == row_bytes_of(Packing::kTwoBit, spec.hidden),
              "packed rows have " + std::to_string(width) + " bytes; " +
                  std::to_string(spec.hidden) + " values need " +
                  std::to_string(row_bytes_of(Packing::kTwoBit, spec.hidden)));
      require(rows_ok(Packing::kTwoBit, static_cast<const uint8_t*>(rows_.data()),
                      static_cast<int>(2 * count), spec.hidden),
              "packed rows hold an illegal code, or padding that is not zero");
    }
    require_scales(spec.form, count);
    require_length(bias_, count, "bias");
    require_length(norm_in_, spec.hidden, "norm_in");
    require_length(norm_out_, count, "norm_out");
    spec.rows = rows_.data();
    spec.scales = pointer_of(scales_);
    spec.bias = pointer_of(bias_);
    spec.norm_in = pointer_of(norm_in_);
    spec.norm_out = pointer_of(norm_out_);
    return spec;
  }

  void require_scales(FffForm form, size_t count) const {
    if (form == FffForm::kInt8) {
      require(
          scales_ && scales_->ndim() == 2 && scales_->shape(0) == count && scales_->shape(1) == 2,
          "int8 rows need scales [rows, 2]");
    } else if (form == FffForm::kTernary) {
      require(scales_ && scales_->ndim() == 1 && scales_->shape(0) == 2,
              "ternary rows need scales [2]");
    } else {
      require(!scales_, "float rows have no scales");
    }
  }

  StoredRows rows_;
  std::optional<Scales> scales_;
  std::optional<In<float, 1>> bias_, norm_in_, norm_out_;
  int threads_;
  const Isa* isa_;
  FffLayer layer_;
};

// --- training primitives ------------------------------------------------------------------------

void require_paths(In<int32_t, 2> rows, size_t tokens, size_t active, size_t count) {
  require(rows.shape(0) == tokens && rows.shape(1) == active, "rows and values differ in shape");
  int32_t low = 0, high = -1;
  const int32_t* data = rows.data();
  for (size_t i = 0; i < tokens * active; ++i) {
    low = std::min(low, data[i]);
    high = std::max(high, data[i]);
  }
  require(low >= 0 && high < static_cast<int64_t>(count),
          "a row index is outside 0 .. " + std::to_string(static_cast<int64_t>(count) - 1));
}

void walk(In<float, 2> x, In<float, 2> w_in, std::optional<In<float, 1>> bias, Out<float, 3> logits,
          Out<int32_t, 3> rows, int trees, int depth, int threads, const IsaName& isa) {
  require_rows(w_in.shape(0), trees, depth);
  require(x.shape(1) == w_in.shape(1), "x has " + std::to_string(x.shape(1)) + " columns, w_in " +
                                           std::to_string(w_in.shape(1)));
  require_length(bias, w_in.shape(0), "bias");
  const auto fits = [&](const auto& array) {
    return array.shape(0) == x.shape(0) && array.shape(1) == static_cast<size_t>(trees) &&
           array.shape(2) == static_cast<size_t>(depth) + 1;
  };
  require(fits(logits) && fits(rows), "logits and rows must be [tokens, trees, depth + 1]");
  FffSpec spec;
  spec.activation = Activation::kRelu;
  spec.hidden = checked_int(x.shape(1), "columns");
  spec.trees = trees, spec.depth = depth;
  spec.bias = pointer_of(bias);
  const FffLayer layer = FffLayer::apart(spec, w_in.data(), isa_of(isa));
  const int tokens = checked_int(x.shape(0), "tokens");
  with_pool(threads, [&](ThreadPool& pool, FffWork& work) {
    layer.forward(x.data(), tokens, nullptr, rows.data(), logits.data(), pool, work);
  });
}

void combine(In<float, 2> h, In<int32_t, 2> rows, In<float, 2> w, Out<float, 2> y, int threads,
             const IsaName& isa) {
  require_paths(rows, h.shape(0), h.shape(1), w.shape(0));
  require(y.shape(0) == h.shape(0) && y.shape(1) == w.shape(1), "y must be [tokens, columns of w]");
  const int tokens = checked_int(h.shape(0), "tokens"), active = checked_int(h.shape(1), "active");
  const int columns = checked_int(w.shape(1), "columns");
  const TreeKernels& fff = *isa_of(isa).trees;
  with_pool(threads, [&](ThreadPool& pool, FffWork&) {
    fff_combine(h.data(), rows.data(), tokens, active, w.data(), columns, y.data(), fff, pool);
  });
}

void gather_dot(In<float, 2> g, In<int32_t, 2> rows, In<float, 2> w, Out<float, 2> out, int threads,
                const IsaName& isa) {
  require_paths(rows, out.shape(0), out.shape(1), w.shape(0));
  require(g.shape(0) == out.shape(0) && g.shape(1) == w.shape(1), "g must be [tokens, columns]");
  const int tokens = checked_int(g.shape(0), "tokens"),
            active = checked_int(out.shape(1), "active");
  const int columns = checked_int(w.shape(1), "columns");
  const TreeKernels& fff = *isa_of(isa).trees;
  with_pool(threads, [&](ThreadPool& pool, FffWork&) {
    fff_gather_dot(g.data(), rows.data(), tokens, active, w.data(), columns, out.data(), fff, pool);
  });
}

void segment_sum(In<float, 2> h, In<int32_t, 2> rows, In<float, 2> a, Out<float, 2> out,
                 std::optional<Out<float, 1>> sums, int threads, const IsaName& isa) {
  require_paths(rows, h.shape(0), h.shape(1), out.shape(0));
  require(a.shape(0) == h.shape(0) && a.shape(1) == out.shape(1), "a must be [tokens, columns]");
  require_length(sums, out.shape(0), "sums");
  const int tokens = checked_int(h.shape(0), "tokens"), active = checked_int(h.shape(1), "active");
  const int columns = checked_int(a.shape(1), "columns"), count = checked_int(out.shape(0), "rows");
  const TreeKernels& fff = *isa_of(isa).trees;
  float* totals = pointer_of(sums);
  with_pool(threads, [&](ThreadPool& pool, FffWork&) {
    fff_segment_sum(h.data(), rows.data(), tokens, active, a.data(), columns, count, out.data(),
                    totals, fff, pool);
  });
}

bool activate(const std::string& isa, const std::string& activation, In<float, 1> logits,
              Out<float, 1> h) {
  require(logits.shape(0) == h.shape(0), "logits and h differ in length");
  const TreeKernels& fff = *isa_of(isa).trees;
  return fff.activate(activation_of(activation), logits.data(),
                      checked_int(logits.shape(0), "count"), h.data());
}

}  // namespace

void bind_layers(nb::module_& parent) {
  nb::module_ m = parent.def_submodule("fff", "Conditional feed-forward layers.");
  nb::class_<Layer>(m, "Layer", "One layer; reads the arrays in place and keeps them alive.")
      .def(nb::init<const std::string&, StoredRows, int, int, const std::string&,
                    std::optional<Scales>, std::optional<In<float, 1>>, std::optional<In<float, 1>>,
                    std::optional<In<float, 1>>, float, int, const IsaName&>(),
           "form"_a, "rows"_a, "trees"_a, "depth"_a, "activation"_a, "scales"_a.none() = nb::none(),
           "bias"_a.none() = nb::none(), "norm_in"_a.none() = nb::none(),
           "norm_out"_a.none() = nb::none(), "eps"_a = 1e-6f, "threads"_a = 1,
           "isa"_a.none() = nb::none())
      // Outputs are never converted: results would go into the copy.
      .def("forward", &Layer::forward, "x"_a, "y"_a.noconvert().none(),
           "rows"_a.noconvert().none() = nb::none(), "logits"_a.noconvert().none() = nb::none())
      .def_prop_ro("isa", &Layer::isa)
      .def_prop_ro("threads", &Layer::threads);
  m.def("time_forward", &Layer::time_forward, "layers"_a, "x"_a, "repeats"_a);
  m.def("walk", &walk, "x"_a, "w_in"_a, "bias"_a.none(), "logits"_a.noconvert(),
        "rows"_a.noconvert(), "trees"_a, "depth"_a, "threads"_a, "isa"_a.none() = nb::none());
  m.def("combine", &combine, "h"_a, "rows"_a, "w"_a, "y"_a.noconvert(), "threads"_a,
        "isa"_a.none() = nb::none());
  m.def("gather_dot", &gather_dot, "g"_a, "rows"_a, "w"_a, "out"_a.noconvert(), "threads"_a,
        "isa"_a.none() = nb::none());
  m.def("segment_sum", &segment_sum, "h"_a, "rows"_a, "a"_a, "out"_a.noconvert(),
        "sums"_a.noconvert().none(), "threads"_a, "isa"_a.none() = nb::none());
  m.def("activate", &activate, "isa"_a, "activation"_a, "logits"_a, "h"_a.noconvert());
}

}  // namespace nomatmul
