// nomatmul._native.Model: a model's step. Everything a user can get wrong is checked before it
// gets here or raises ValueError; long calls run without the GIL.

#include <chrono>
#include <cstring>
#include <stdexcept>

#include "bindings/common.h"
#include "core/model.h"

namespace nomatmul {
namespace {

using Floats = Out<float, 2>;
using Row = Out<float, 1>;
using Ids = In<int32_t, 1>;
using Stored = nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu>;
using Quants = In<int8_t, 2>;

DType dtype_of(const nb::dlpack::dtype& dtype, size_t itemsize) {
  using Code = nb::dlpack::dtype_code;
  const Code code = static_cast<Code>(dtype.code);
  if (itemsize == 1 && code == Code::UInt) return DType::kU8;
  if (itemsize == 1 && code == Code::Int) return DType::kI8;
  // numpy has no bfloat16: its bits come as uint16
  if (itemsize == 2 && code == Code::UInt) return DType::kBF16;
  if (itemsize == 4 && code == Code::Float) return DType::kF32;
  throw std::invalid_argument("tensors are uint8, int8, uint16 (bfloat16 bits) or float32");
}

DType embedding_of(const std::string& form) {
  if (form == "int8") return DType::kI8;
  if (form == "bf16") return DType::kBF16;
  if (form == "f32") return DType::kF32;
  throw std::invalid_argument("embedding must be \"int8\", \"bf16\" or \"f32\", got \"" + form +
                              "\"");
}

class BoundModel {
 public:
  BoundModel(const ModelSpec& spec, const std::optional<std::string>& isa, int threads)
      : model_(spec, isa_of(isa), threads) {}

  // The binding keeps the array alive as long as the model (nb::keep_alive).
  void set(const std::string& name, const Stored& array) {
    model_.set(name, array.data(), array.nbytes(), dtype_of(array.dtype(), array.itemsize()));
  }

  nb::ndarray<nb::numpy, float> step(const std::vector<Floats>& states, const std::vector<Ids>& ids,
                                     const std::string& want_name) {
    model_.check_complete();
    const Want want = want_name == "all"    ? Want::kAll
                      : want_name == "none" ? Want::kNone
                                            : Want::kLast;
    if (states.size() != ids.size()) throw std::invalid_argument("as many states as id lists");
    std::vector<Sequence> sequences;
    size_t total = 0;
    for (size_t s = 0; s < states.size(); ++s) {
      check_state(states[s]);
      sequences.push_back({states[s].data(), ids[s].data(), static_cast<int>(ids[s].shape(0))});
      total += ids[s].shape(0);
    }
    const size_t rows = want == Want::kAll ? total : want == Want::kLast ? states.size() : 0;
    auto logits = new_array<float>(rows, model_.spec().vocab);
    {
      float* out = logits.data();
      model_.own_process();
      nb::gil_scoped_release release;
      model_.step(sequences, want, out, poll());
    }
    return logits;
  }

  void block(int layer, Floats x, Row state) {
    model_.check_complete();
    if (layer < 0 || layer >= model_.spec().layers) {
      throw std::invalid_argument("layer is out of range");
    }
    const size_t hidden = model_.spec().hidden;
    if (x.shape(1) != hidden || state.shape(0) != hidden) {
      throw std::invalid_argument("block takes x [T, hidden] and state [hidden]");
    }
    model_.own_process();
    nb::gil_scoped_release release;
    model_.block(layer, x.data(), static_cast<int>(x.shape(0)), state.data());
  }

  nb::ndarray<nb::numpy, float> logits_of(Floats x) {
    model_.check_complete();
    if (x.shape(1) != static_cast<size_t>(model_.spec().hidden)) {
      throw std::invalid_argument("logits_of takes x [T, hidden]");
    }
    auto logits = new_array<float>(x.shape(0), model_.spec().vocab);
    model_.own_process();
    {
      nb::gil_scoped_release release;
      model_.logits_of(x.data(), static_cast<int>(x.shape(0)), logits.data());
    }
    return logits;
  }

  nb::ndarray<nb::numpy, int32_t> accumulate(const std::string& name, Quants q) {
    model_.check_complete();
    const Ternary& linear = model_.linear(name);
    if (q.shape(1) != static_cast<size_t>(linear.k)) {
      throw std::invalid_argument(name + " takes rows of " + std::to_string(linear.k));
    }
    auto out = new_array<int32_t>(q.shape(0), linear.n);
    model_.accumulate(name, q.data(), static_cast<int>(q.shape(0)), out.data());
    return out;
  }

  // (rows, logits) of the walk of a layer's FFF
  std::pair<nb::ndarray<nb::numpy, int32_t>, nb::ndarray<nb::numpy, float>> walk(int layer,
                                                                                 Floats x) {
    model_.check_complete();
    const ModelSpec& spec = model_.spec();
    if (layer < 0 || layer >= spec.layers || spec.trees == 0 ||
        x.shape(1) != static_cast<size_t>(spec.hidden)) {
      throw std::invalid_argument("walk takes a layer that has trees, and x [T, hidden]");
    }
    auto rows = new_array<int32_t>(x.shape(0), model_.active());
    auto logits = new_array<float>(x.shape(0), model_.active());
    model_.own_process();
    {
      // Without the GIL: a step of another thread holds the model's lock and asks for the GIL.
      nb::gil_scoped_release release;
      model_.walk(layer, x.data(), static_cast<int>(x.shape(0)), rows.data(), logits.data());
    }
    return {rows, logits};
  }

  const Model& model() const { return model_; }

 private:
  void check_state(const Floats& state) const {
    const ModelSpec& spec = model_.spec();
    if (state.shape(0) == static_cast<size_t>(spec.layers) &&
        state.shape(1) == static_cast<size_t>(spec.hidden)) {
      return;
    }
    throw std::invalid_argument("a state is float32 [layers, hidden]");
  }

  // Lets Ctrl-C stop a long step; looks at most ten times a second.
  static std::function<void()> poll() {
    using Clock = std::chrono::steady_clock;
    auto last = std::make_shared<Clock::time_point>(Clock::now());
    return [last] {
      if (Clock::now() - *last < std::chrono::milliseconds(100)) return;
      *last = Clock::now();
      nb::gil_scoped_acquire acquire;
      if (PyErr_CheckSignals() != 0) throw nb::python_error();
    };
  }

  Model model_;
};

ModelSpec make_spec(int vocab, int hidden, int layers, int intermediate, const std::string& packing,
                    const std::string& embedding, float norm_eps, float linear_norm_eps,
                    float gate_norm_eps, int chunk, int trees, int depth) {
  const int limit = kMaxElements;
  if (vocab < 1 || hidden < 1 || layers < 1 || intermediate < 0 || hidden > limit ||
      intermediate > limit / 2 || chunk < 1 || chunk > 65536) {
    throw std::invalid_argument("a size of the model is out of range");
  }
  // rows are numbered by int32; the other limit is fff.cc's, of active rows
  if (trees < 0 || depth < 0 || depth > 24 || (trees > 0 && intermediate > 0) ||
      static_cast<int64_t>(trees) * (2 << depth) > INT32_MAX ||
      static_cast<int64_t>(trees) * (depth + 1) > 65536) {
    throw std::invalid_argument("trees or depth is out of range");
  }
  ModelSpec spec;
  spec.trees = trees, spec.depth = depth;
  spec.vocab = vocab, spec.hidden = hidden, spec.layers = layers;
  spec.intermediate = intermediate, spec.packing = packing_of(packing);
  spec.embedding = embedding_of(embedding);
  spec.norm_eps = norm_eps, spec.linear_norm_eps = linear_norm_eps;
  spec.gate_norm_eps = gate_norm_eps, spec.chunk = chunk;
  return spec;
}

}  // namespace

void bind_model(nb::module_& m) {
  nb::class_<BoundModel>(m, "Model")
      .def(
          "__init__",
          [](BoundModel* self, int vocab, int hidden, int layers, int intermediate,
             const std::string& packing, const std::string& embedding, float norm_eps,
             float linear_norm_eps, float gate_norm_eps, int chunk, std::optional<std::string> isa,
             int threads, int trees, int depth) {
            new (self)
                BoundModel(make_spec(vocab, hidden, layers, intermediate, packing, embedding,
                                     norm_eps, linear_norm_eps, gate_norm_eps, chunk, trees, depth),
                           isa, threads);
          },
          "vocab"_a, "hidden"_a, "layers"_a, "intermediate"_a, "packing"_a, "embedding"_a,
          "norm_eps"_a, "linear_norm_eps"_a, "gate_norm_eps"_a, "chunk"_a, "isa"_a.none(),
          "threads"_a, "trees"_a = 0, "depth"_a = 0)
      .def("set", &BoundModel::set, "name"_a, "array"_a, nb::keep_alive<1, 3>())
      .def("check_complete", [](const BoundModel& b) { b.model().check_complete(); })
      .def("step", &BoundModel::step, "states"_a, "ids"_a, "want"_a)
      .def("block", &BoundModel::block, "layer"_a, "x"_a, "state"_a)
      .def("logits_of", &BoundModel::logits_of, "x"_a)
      .def("accumulate", &BoundModel::accumulate, "name"_a, "q"_a)
      .def("walk", &BoundModel::walk, "layer"_a, "x"_a)
      .def_prop_ro("isa", [](const BoundModel& b) { return b.model().isa().name; })
      .def_prop_ro("threads", [](const BoundModel& b) { return b.model().threads(); })
      .def_prop_ro("scratch_bytes", [](const BoundModel& b) { return b.model().scratch_bytes(); });
}

}  // namespace nomatmul
