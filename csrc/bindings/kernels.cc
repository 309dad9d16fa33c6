// The kernels as Python functions over numpy arrays, for the parity tests, `doctor` and the
// benchmarks. Every shape is checked here, before a kernel sees a pointer.

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings/timing.h"
#include "core/whole_attention.h"
#include "core/whole_product.h"

namespace nomatmul {
namespace {

using AnyOut = nb::ndarray<nb::ndim<2>, nb::c_contig, nb::device::cpu>;

struct Shape {
  int m, k, n;
  size_t row_bytes;
};

Shape check_product(Packing packing, size_t rows, size_t row_bytes, size_t m, size_t k) {
  Shape shape{checked_int(m, "m"), checked_int(k, "k"), checked_int(rows, "n"), row_bytes};
  require(shape.k >= 1, "k is 0, expected at least 1");
  require(row_bytes >= row_bytes_of(packing, shape.k),
          "w has rows of " + std::to_string(row_bytes) + " bytes; k = " + std::to_string(k) +
              " needs " + std::to_string(row_bytes_of(packing, shape.k)));
  return shape;
}

// out[:, n0:n1] = q @ w.T, in place; int32 out without token_scale, float32 out with it.
void product(const std::string& isa, const std::string& form, In<uint8_t, 2> w, In<int8_t, 2> q,
             std::optional<In<float, 1>> token_scale, AnyOut out, int n0, int n1) {
  const TernaryKernels& kernels = *isa_of(isa).ternary;
  const Packing packing = packing_of(form);
  const Shape s = check_product(packing, w.shape(0), w.shape(1), q.shape(0), q.shape(1));
  require(0 <= n0 && n0 <= n1 && n1 <= s.n, "rows " + std::to_string(n0) + " to " +
                                                std::to_string(n1) + " leave w's " +
                                                std::to_string(s.n));
  require(out.shape(0) == q.shape(0) && out.shape(1) >= static_cast<size_t>(n1),
          "out must be [m, at least n1]");
  const bool scaled = token_scale.has_value();
  require(scaled ? out.dtype() == nb::dtype<float>() : out.dtype() == nb::dtype<int32_t>(),
          "out must be float32 with token_scale, int32 without");
  require(!scaled || token_scale->shape(0) == q.shape(0), "token_scale must be [m]");
  whole_product(
      kernels, packing, q.data(),
      {w.data(), s.row_bytes, n0, n1, s.m, s.k, pointer_of(token_scale), out.data(), out.shape(1)});
}

// Seconds of each of `repeats` products, weights w[r % copies], rows split over threads.
std::vector<double> time_product(const std::string& isa, const std::string& form, In<uint8_t, 3> w,
                                 In<int8_t, 2> q, int threads, int repeats) {
  const TernaryKernels& kernels = *isa_of(isa).ternary;
  const Packing packing = packing_of(form);
  const Shape s = check_product(packing, w.shape(1), w.shape(2), q.shape(0), q.shape(1));
  require(w.shape(0) >= 1, "w holds no copy");
  ExactBuffer prepared(kernels.prepared_bytes(packing, s.m, s.k));
  kernels.prepare(packing, q.data(), s.m, s.k, s.k, prepared.data());
  const size_t copies = w.shape(0), copy_bytes = w.shape(1) * w.shape(2);
  std::vector<int32_t> out(static_cast<size_t>(s.m) * static_cast<size_t>(s.n));
  const auto run = [&](int repeat, int from, int end, void* scratch) {
    kernels.product(packing, {w.data() + repeat % copies * copy_bytes, s.row_bytes, from, end, s.m,
                              s.k, nullptr, out.data(), size_t(s.n), prepared.data(), scratch});
  };
  return seconds_of(s.n, threads, repeats, kernels.scratch_bytes(packing, s.m, s.k), run);
}

int same_size(std::initializer_list<size_t> sizes) {
  for (size_t size : sizes) require(size == *sizes.begin(), "arrays differ in length");
  require(*sizes.begin() >= 1, "arrays are empty");
  return checked_int(*sizes.begin(), "d");
}

// (quantisation step, q) of fn(q) with room for d values.
template <class Quantize>
nb::tuple quantized(int d, Quantize quantize) {
  auto q = new_array<int8_t>(d);
  std::fill_n(q.data(), d, int8_t{0});  // not all of them are written where x is not finite
  const float step = quantize(q.data());
  return nb::make_tuple(step, q);
}

nb::tuple rms_norm_quantize(const std::string& isa, In<float, 1> x, In<float, 1> w, float eps) {
  const TernaryKernels& kernels = *isa_of(isa).ternary;
  const int d = same_size({x.shape(0), w.shape(0)});
  return quantized(
      d, [&](int8_t* q) { return kernels.rms_norm_quantize(x.data(), w.data(), eps, d, q); });
}

nb::tuple scale_quantize(const std::string& isa, In<float, 1> y, std::optional<In<float, 1>> w,
                         const std::string& rounding) {
  const TernaryKernels& kernels = *isa_of(isa).ternary;
  const int d = same_size({y.shape(0), w ? w->shape(0) : y.shape(0)});
  const Rounding ties = rounding_of(rounding);
  return quantized(
      d, [&](int8_t* q) { return kernels.scale_quantize(y.data(), pointer_of(w), ties, d, q); });
}

void normalise(const std::string& isa, In<float, 1> x, float eps, Out<float, 1> y) {
  const int d = same_size({x.shape(0), y.shape(0)});
  isa_of(isa).ternary->normalise(x.data(), eps, d, y.data());
}

void rms_norm(const std::string& isa, In<float, 1> x, In<float, 1> w, float eps, Out<float, 1> y) {
  const int d = same_size({x.shape(0), w.shape(0), y.shape(0)});
  isa_of(isa).ternary->rms_norm(x.data(), w.data(), eps, d, y.data());
}

void mlgru_step(const std::string& isa, In<float, 1> i, In<float, 1> f,
                std::optional<In<float, 1>> lb, float keep, Out<float, 1> h) {
  const size_t bound = lb.has_value() ? lb->shape(0) : h.shape(0);
  const int d = same_size({i.shape(0), f.shape(0), bound, h.shape(0)});
  isa_of(isa).ternary->mlgru_step(i.data(), f.data(), pointer_of(lb), keep, d, h.data());
}

void gate_norm(const std::string& isa, In<float, 1> g, In<float, 1> h, In<float, 1> w, float eps,
               Out<float, 1> y) {
  const int d = same_size({g.shape(0), h.shape(0), w.shape(0), y.shape(0)});
  isa_of(isa).ternary->gate_norm(g.data(), h.data(), w.data(), eps, d, y.data());
}

void gated(const std::string& isa, const std::string& kind, In<float, 1> gate, In<float, 1> up,
           Out<float, 1> y) {
  const int d = same_size({gate.shape(0), up.shape(0), y.shape(0)});
  isa_of(isa).ternary->gated(activation_of(kind), gate.data(), up.data(), d, y.data());
}

void add(const std::string& isa, Out<float, 1> x, In<float, 1> y) {
  const int d = same_size({x.shape(0), y.shape(0)});
  isa_of(isa).ternary->add(x.data(), y.data(), d);
}

std::string best() { return isa_of(std::nullopt).name; }

bool codes_ok(const std::string& isa, const std::string& form, In<uint8_t, 1> w) {
  return isa_of(isa).ternary->codes_ok(packing_of(form), w.data(), w.shape(0));
}

// Of one token: y = layer norm (with a bias) or RMS norm. Whether y is finite.
bool norm(const std::string& isa, In<float, 1> x, In<float, 1> weight,
          std::optional<In<float, 1>> bias, float eps, Out<float, 1> y) {
  const size_t shift = bias ? bias->shape(0) : x.shape(0);
  const int d = same_size({x.shape(0), weight.shape(0), shift, y.shape(0)});
  require(x.data() != y.data(), "y must not be x");
  return isa_of(isa).dense->norm(x.data(), weight.data(), pointer_of(bias), eps, d, y.data());
}

void activate(const std::string& isa, const std::string& kind, Out<float, 1> x) {
  isa_of(isa).dense->activate(activation_of(kind), x.data(), x.shape(0));
}

// out [T, heads * e] = softmax(q k^T / sqrt(e)) v of one sequence's qkv [T, 3 * heads * e].
void attention(const std::string& isa, In<float, 2> qkv, std::optional<In<uint8_t, 1>> seen,
               int heads, Out<float, 2> out) {
  const size_t d = out.shape(1);
  const int t = checked_int(out.shape(0), "tokens");
  require(heads >= 1 && t >= 1 && d >= 1 && d % heads == 0, "heads divide the columns of out");
  require(qkv.shape(0) == out.shape(0) && qkv.shape(1) == 3 * d, "qkv is [T, 3 columns of out]");
  require(!seen || seen->shape(0) == out.shape(0), "seen has a value for each token");
  const DenseKernels& kernels = *isa_of(isa).dense;
  const int e = checked_int(d, "columns") / heads;
  ExactBuffer scratch(kernels.attention_scratch(t, e) * sizeof(float));
  for (int head = 0; head < heads; ++head) {
    const float* q = qkv.data() + static_cast<size_t>(head) * e;
    kernels.attention(q, q + d, q + 2 * d, 3 * d, pointer_of(seen), t, e,
                      static_cast<float*>(scratch.data()),
                      out.data() + static_cast<size_t>(head) * e, d);
  }
}

// Causal attention of the last tokens of a sequence: q and out [T, heads, E], k and v [P, kv heads,
// E]. Whether keys and values are finite as they are kept.
bool causal_attention(const std::string& isa, In<float, 3> q, In<float, 3> k, In<float, 3> v,
                      const std::string& kv, int rows, Out<float, 3> out) {
  const size_t heads = q.shape(1), kv_heads = k.shape(1), e = q.shape(2);
  require(e >= 1 && q.shape(0) >= 1 && kv_heads >= 1 && heads >= 1 && heads % kv_heads == 0,
          "kv heads divide the heads, and nothing is empty");
  require(k.shape(2) == e && v.shape(2) == e && v.shape(0) == k.shape(0) &&
              v.shape(1) == kv_heads && k.shape(0) >= q.shape(0),
          "k and v are [at least T, kv heads, E]");
  require(out.shape(0) == q.shape(0) && out.shape(1) == heads && out.shape(2) == e,
          "out has the shape of q");
  require(rows >= 1 && rows <= kMaxAttentionRows, "rows is out of range");
  const int tokens = checked_int(q.shape(0), "tokens");
  return whole_attention(*isa_of(isa).attention,
                         {static_cast<int>(heads), static_cast<int>(kv_heads), checked_int(e, "E"),
                          tokens, checked_int(k.shape(0), "positions"), kv_form_of(kv), rows,
                          q.data(), k.data(), v.data(), out.data()});
}

}  // namespace

void bind_kernels(nb::module_& parent) {
  nb::module_ m = parent.def_submodule("kernels", "The native kernels, one by one, for tests.");
  m.def("isas", &available_isas, "Names of the instruction sets that run here, best first.");
  m.def("best", &best, "The one that would be used: the first, or what NOMATMUL_ISA names.");
  m.def("product", &product, "isa"_a, "packing"_a, "w"_a, "q"_a, "token_scale"_a.none(), "out"_a,
        "n0"_a, "n1"_a);
  m.def("time_product", &time_product, "isa"_a, "packing"_a, "w"_a, "q"_a, "threads"_a,
        "repeats"_a);
  m.def("rms_norm_quantize", &rms_norm_quantize, "isa"_a, "x"_a, "w"_a, "eps"_a);
  m.def("normalise", &normalise, "isa"_a, "x"_a, "eps"_a, "y"_a);
  m.def("scale_quantize", &scale_quantize, "isa"_a, "y"_a, "w"_a.none(), "rounding"_a = "away");
  m.def("rms_norm", &rms_norm, "isa"_a, "x"_a, "w"_a, "eps"_a, "y"_a);
  m.def("mlgru_step", &mlgru_step, "isa"_a, "i"_a, "f"_a, "lb"_a.none(), "keep"_a, "h"_a);
  m.def("gate_norm", &gate_norm, "isa"_a, "g"_a, "h"_a, "w"_a, "eps"_a, "y"_a);
  m.def("gated", &gated, "isa"_a, "kind"_a, "gate"_a, "up"_a, "y"_a);
  m.def("add", &add, "isa"_a, "x"_a, "y"_a);
  // Outputs are never converted: results would go into the copy.
  m.def("norm", &norm, "isa"_a, "x"_a, "weight"_a, "bias"_a.none(), "eps"_a, "y"_a.noconvert());
  m.def("activate", &activate, "isa"_a, "kind"_a, "x"_a.noconvert());
  m.def("attention", &attention, "isa"_a, "qkv"_a, "seen"_a.none(), "heads"_a, "out"_a.noconvert());
  m.def("causal_attention", &causal_attention, "isa"_a, "q"_a, "k"_a, "v"_a, "kv"_a, "rows"_a,
        "out"_a.noconvert());
  m.def("codes_ok", &codes_ok, "isa"_a, "packing"_a, "w"_a);
}

}  // namespace nomatmul
