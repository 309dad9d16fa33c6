// nomatmul._native.kernels.Panels and float_product: the products of causal models' linears that
// have scales of groups, or floats, for the parity tests and the benchmarks.

#include "bindings/timing.h"
#include "core/linears/whole_panels.h"

namespace nomatmul {
namespace {

class BoundPanels {
 public:
  // rows: uint8 [n, packed] in a packing's form, or int8 [n, k]; scale: float16 or float32
  // [n, k / group]. copies: how often they lie in memory.
  BoundPanels(const std::string& isa, const std::string& form, Stored rows, Stored scale, int k,
              int copies)
      : isa_(isa_of(isa)), rows_(checked_int(rows.shape(0), "rows")) {
    const bool int8 = form == "int8";
    require(rows.ndim() == 2 && scale.ndim() == 2 && scale.shape(0) == rows.shape(0) &&
                scale.shape(1) >= 1 && k >= 1 && k % scale.shape(1) == 0 && copies >= 1,
            "rows [n, k], scale [n, groups]");
    const PanelShape shape{int8 ? PanelForm::kInt8 : PanelForm::kTernary, k,
                           k / static_cast<int>(scale.shape(1)), dtype_of(scale) == DType::kF16};
    const size_t row = int8 ? k : row_bytes_of(packing_of(form), k);
    require(rows.shape(1) == row && dtype_of(rows) == (int8 ? DType::kI8 : DType::kU8),
            "rows do not have the bytes of their form");
    for (int i = 0; i < copies; ++i) {
      weights_.emplace_back(shape, isa_.panels->int8_bias, rows_, 1);
      if (int8) {
        weights_.back().fill_int8(static_cast<const int8_t*>(rows.data()));
      } else {
        weights_.back().fill_codes(packing_of(form), static_cast<const uint8_t*>(rows.data()));
      }
      weights_.back().fill_scales(scale.data());
    }
  }

  BoundPanels(const BoundPanels&) = delete;

  nb::ndarray<nb::numpy, float> product(In<int8_t, 2> q, In<float, 2> step) const {
    const int m = check(q, step);
    auto out = new_array<float>(m, rows_);
    whole_panels(*isa_.panels, weights_[0], rows_, q.data(), step.data(), m, out.data());
    return out;
  }

  nb::ndarray<nb::numpy, float> values(int row) const {
    require(row >= 0 && row < rows_, "row is out of range");
    auto out = new_array<float>(weights_[0].shape().k);
    weights_[0].values(row, out.data());
    return out;
  }

  // Seconds of each of `repeats` products of up to 256 tokens, rows split over threads.
  std::vector<double> time(In<int8_t, 2> q, In<float, 2> step, int threads, int repeats) const {
    const int m = check(q, step);
    const PanelShape& shape = weights_[0].shape();
    const int width = panel_width(m), tiles = (m + width - 1) / width;
    const size_t tile_bytes = shape.tile_bytes(width);
    ExactBuffer prepared(tile_bytes * tiles);
    auto* to = static_cast<uint8_t*>(prepared.data());
    for (int i = 0; i < tiles; ++i) {
      const size_t first = static_cast<size_t>(i) * width;
      isa_.panels->prepare(shape, q.data() + first * shape.k, step.data() + first * shape.groups(),
                           std::min(width, m - i * width), width, to + i * tile_bytes);
    }
    std::vector<float> out(static_cast<size_t>(m) * rows_);
    const auto run = [&](int repeat, int from, int end, void* scratch) {
      for (int row = from; row < end; row += 64) {
        isa_.panels->product(
            shape, {weights_[repeat % weights_.size()].panel_of(row), std::min(64, end - row), m,
                    width, to, out.data() + row, static_cast<size_t>(rows_), scratch});
      }
    };
    return seconds_of(rows_, threads, repeats, isa_.panels->scratch_bytes(shape, m), run);
  }

  size_t panel_bytes() const { return weights_[0].shape().bytes(); }

 private:
  int check(const In<int8_t, 2>& q, const In<float, 2>& step) const {
    const PanelShape& shape = weights_[0].shape();
    require(q.shape(1) == static_cast<size_t>(shape.k) && step.shape(0) == q.shape(0) &&
                step.shape(1) == static_cast<size_t>(shape.groups()) && q.shape(0) >= 1 &&
                q.shape(0) <= 256,
            "q is int8 [1 to 256, k], step float32 [m, groups]");
    return static_cast<int>(q.shape(0));
  }

  const Isa& isa_;
  int rows_;
  std::vector<PanelWeights> weights_;
};

// x [m, k] times rows of float32, float16 or bfloat16 bits [n, k].
nb::ndarray<nb::numpy, float> float_product(const std::string& isa, In<float, 2> x, Stored rows) {
  require(rows.ndim() == 2 && rows.shape(1) == x.shape(1), "rows are [n, columns of x]");
  const DType dtype = dtype_of(rows);
  require(dtype == DType::kF32 || dtype == DType::kF16 || dtype == DType::kBF16, "rows of floats");
  const FloatForm form = dtype == DType::kF32   ? FloatForm::kF32
                         : dtype == DType::kF16 ? FloatForm::kF16
                                                : FloatForm::kBF16;
  auto out = new_array<float>(x.shape(0), rows.shape(0));
  isa_of(isa).panels->float_product(
      {form, rows.data(), checked_int(rows.shape(0), "rows"), checked_int(x.shape(0), "tokens"),
       checked_int(x.shape(1), "columns"), x.data(), out.data(), rows.shape(0)});
  return out;
}

}  // namespace

void bind_panels(nb::module_& parent) {
  nb::module_ m = nb::cast<nb::module_>(parent.attr("kernels"));
  nb::class_<BoundPanels>(m, "Panels", "Rows with scales of groups, as one product takes them.")
      .def(nb::init<const std::string&, const std::string&, Stored, Stored, int, int>(), "isa"_a,
           "form"_a, "rows"_a, "scale"_a, "k"_a, "copies"_a = 1)
      .def("product", &BoundPanels::product, "q"_a, "step"_a)
      .def("values", &BoundPanels::values, "row"_a)
      .def("time", &BoundPanels::time, "q"_a, "step"_a, "threads"_a, "repeats"_a)
      .def_prop_ro("panel_bytes", &BoundPanels::panel_bytes);
  m.def("float_product", &float_product, "isa"_a, "x"_a, "rows"_a);
}

}  // namespace nomatmul
