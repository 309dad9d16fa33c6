// nomatmul._native.Linear: one int8 or float32 linear, for task heads and for tests.
#include <stdexcept>

#include "bindings/common.h"
#include "core/layers.h"

namespace nomatmul {
namespace {

class BoundLinear {
 public:
  // weight: float32, bfloat16 bits or int8 [outputs, inputs], copied; scale: float32 [outputs] of
  // int8.
  BoundLinear(Stored weight, std::optional<In<float, 1>> scale, int threads, const IsaName& isa)
      : isa_(&isa_of(isa)), threads_(checked_threads(threads)), scale_(scale) {
    require(weight.ndim() == 2, "a weight has rows and columns");
    const DType dtype = dtype_of(weight);
    Description is;
    is.kind = dtype == DType::kI8 ? "int8" : "float";
    is.numbers = {{"outputs", static_cast<double>(weight.shape(0))},
                  {"inputs", static_cast<double>(weight.shape(1))}};
    if (dtype != DType::kI8) is.words["form"] = dtype == DType::kF32 ? "f32" : "bf16";
    Tensors tensors;
    linear_.declare(is, "linear", *isa_, tensors);
    tensors.set("linear.weight", weight.data(), weight.nbytes(), dtype);
    if (scale) tensors.set("linear.scale", scale->data(), scale->nbytes(), DType::kF32);
    tensors.check_complete();
  }

  nb::ndarray<nb::numpy, float> operator()(In<float, 2> x) const {
    require(x.shape(1) == static_cast<size_t>(linear_.inputs()),
            "x has " + std::to_string(x.shape(1)) + " columns, the weight " +
                std::to_string(linear_.inputs()));
    auto out = new_array<float>(x.shape(0), linear_.outputs());
    const int tokens = checked_int(x.shape(0), "tokens");
    // A linear without a norm only reads its input.
    auto* values = const_cast<float*>(x.data());
    float* to = out.data();
    with_pool(threads_, [&](ThreadPool& pool, FffWork&) {
      Pass pass;
      pass.isa = isa_, pass.pool = &pool, pass.threads = threads_, pass.layer = -1;
      pass.begin(tokens);
      pass.reserve(linear_);
      pass.feed_values(linear_, values, "linear");
      pass.product(tokens, to);
    });
    return out;
  }

 private:
  const Isa* isa_;
  int threads_;
  std::optional<In<float, 1>> scale_;  // read in place
  Linear linear_;
};

}  // namespace

void bind_linear(nb::module_& m) {
  nb::class_<BoundLinear>(m, "Linear", "x [n, k] to x W^T [n, m]; a row's result is its own.")
      .def(nb::init<Stored, std::optional<In<float, 1>>, int, const IsaName&>(), "weight"_a,
           "scale"_a.none() = nb::none(), "threads"_a = 1, "isa"_a.none() = nb::none())
      .def("__call__", &BoundLinear::operator(), "x"_a);
}

}  // namespace nomatmul
