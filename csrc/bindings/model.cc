// nomatmul._native.Model: decoders and encoders, from a description. Everything a user can get
// wrong is checked before it gets here or raises ValueError; long calls run without the GIL.
#include "core/model.h"

#include <nanobind/stl/map.h>

#include <chrono>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "bindings/common.h"
#include "core/pages.h"

namespace nomatmul {
namespace {

using Floats = Out<float, 2>;
using Array = nb::ndarray<nb::numpy, float>;
using Rows = nb::ndarray<nb::numpy, int32_t>;

// {"kind": ..., name: number, text, part, or list of parts (then named "0", "1", ...)}
Description description_of(nb::dict values) {
  Description found;
  for (const auto [key, value] : values) {
    const std::string name = nb::cast<std::string>(key);
    if (name == "kind") {
      found.kind = nb::cast<std::string>(value);
    } else if (nb::isinstance<nb::dict>(value)) {
      found.parts[name] = description_of(nb::cast<nb::dict>(value));
    } else if (nb::isinstance<nb::list>(value)) {
      Description& list = found.parts[name];
      list.kind = name;
      for (const auto item : nb::cast<nb::list>(value)) {
        list.parts[std::to_string(list.parts.size())] = description_of(nb::cast<nb::dict>(item));
      }
      list.numbers["count"] = static_cast<double>(list.parts.size());
    } else if (nb::isinstance<nb::str>(value)) {
      found.words[name] = nb::cast<std::string>(value);
    } else {
      found.numbers[name] = nb::cast<double>(value);
    }
  }
  return found;
}

// The GIL is released until end() or the end of the scope.
class Released {
 public:
  Released() : thread_(PyEval_SaveThread()) {}
  ~Released() { end(); }
  Released(const Released&) = delete;
  void end() {
    if (thread_ != nullptr) PyEval_RestoreThread(std::exchange(thread_, nullptr));
  }

 private:
  PyThreadState* thread_;
};

class BoundModel {
 public:
  BoundModel(nb::dict description, const IsaName& isa, int threads)
      : model_(description_of(description), isa_of(isa), checked_threads(threads)),
        kept_(std::make_shared<std::vector<nb::object>>()) {}
  BoundModel(const BoundModel& other, int threads)
      : model_(other.model_, checked_threads(threads)), kept_(other.kept_) {}

  // Keeps Python's own object: numpy leaks arrays that C++ lets go of while Python ends.
  void set(const std::string& name, nb::object owner) {
    const auto array = nb::cast<Stored>(owner, false);
    const void* data = array.data();
    const size_t bytes = array.nbytes();
    const DType dtype = dtype_of(array);
    bool kept = false;
    {
      nb::gil_scoped_release release;
      kept = model_.tensors().set(name, data, bytes, dtype);
    }
    if (kept) kept_->push_back(owner);
  }

  // pages: one a sequence, or none where nothing grows. (what is wanted, {part: seconds})
  nb::tuple step(const std::vector<Floats>& states, const std::vector<Pages*>& pages,
                 const std::vector<In<int32_t, 1>>& ids, const std::string& want_name,
                 bool profile) {
    ready(true);
    const Want want = choose<Want>("want", want_name,
                                   {{"last", Want::kLast},
                                    {"all", Want::kAll},
                                    {"none", Want::kNone},
                                    {"hidden", Want::kHidden}});
    const bool grows = model_.state().grows();
    require(states.size() == ids.size() && pages.size() == (grows ? ids.size() : 0),
            "as many states, and pages where they grow, as id lists");
    std::vector<Sequence> sequences;
    size_t total = 0;
    for (size_t s = 0; s < states.size(); ++s) {
      require(states[s].shape(0) == model_.state().layers() &&
                  states[s].shape(1) == model_.state().width(),
              "a state is float32 [layers, S]");
      require(!grows || (pages[s] != nullptr && pages[s]->layout() == model_.state().pages()),
              "pages are those of this model");
      sequences.push_back({states[s].data(), grows ? pages[s] : nullptr, ids[s].data(),
                           checked_int(ids[s].shape(0), "ids")});
      total += ids[s].shape(0);
    }
    const size_t rows = want == Want::kAll ? total : want == Want::kNone ? 0 : states.size();
    auto array =
        new_array<float>(rows, want == Want::kHidden ? model_.hidden() : model_.vocabulary());
    Marks marks;
    {
      float* out = array.data();
      Released released;
      model_.step(sequences, want, out, profile ? &marks : nullptr, poll(&released));
    }
    return nb::make_tuple(array, marks.seconds());
  }

  // A model of the same weights, in the same memory; either may be dropped first.
  BoundModel* with_threads(int threads) const {
    model_.tensors().check_complete();
    return new BoundModel(*this, threads);
  }

  // Of a new sequence.
  Pages pages() const { return Pages(model_.state().pages()); }

  // (hidden [N, D], {layer: visited rows [N, A]}, {part: seconds})
  nb::tuple encode(In<int32_t, 1> ids, In<int64_t, 1> offsets, std::optional<In<uint8_t, 1>> seen,
                   bool want_paths, bool profile) {
    ready(false);
    const size_t tokens = ids.shape(0);
    const int64_t* at = offsets.data();
    const int count = checked_int(offsets.shape(0), "offsets") - 1;
    require(count >= 0 && at[0] == 0, "offsets begin with 0");
    for (int b = 0; b < count; ++b) require(at[b + 1] > at[b], "offsets rise: none is empty");
    require(static_cast<size_t>(at[count]) == tokens && tokens < (1 << 24), "offsets end at N");
    require(!seen || seen->shape(0) == tokens, "seen has a value for each token");
    auto out = new_array<float>(tokens, model_.hidden());
    Texts texts{ids.data(), at, count, pointer_of(seen), {}};
    std::map<int, Rows> paths;
    for (int layer = 0; want_paths && layer < model_.layers(); ++layer) {
      texts.paths.push_back(nullptr);
      if (model_.active(layer) == 0) continue;
      Rows rows = new_array<int32_t>(tokens, model_.active(layer));
      texts.paths.back() = rows.data();
      paths.emplace(layer, rows);
    }
    Marks marks;
    {
      float* to = out.data();
      Released released;
      model_.encode(texts, to, profile ? &marks : nullptr, poll(&released));
    }
    return nb::make_tuple(out, paths, marks.seconds());
  }

  void block(int layer, Floats x, Out<float, 1> state) {
    ready(true);
    require(layer >= 0 && layer < model_.layers(), "layer is out of range");
    require(x.shape(1) == static_cast<size_t>(model_.hidden()) &&
                state.shape(0) == model_.state().width(),
            "block takes x [T, hidden] and state [S]");
    nb::gil_scoped_release release;
    model_.block(layer, x.data(), static_cast<int>(x.shape(0)), state.data());
  }

  Array logits_of(Floats x) {
    ready(true);
    require(x.shape(1) == static_cast<size_t>(model_.hidden()), "logits_of takes x [T, hidden]");
    auto logits = new_array<float>(x.shape(0), model_.vocabulary());
    float* out = logits.data();
    nb::gil_scoped_release release;
    model_.logits_of(x.data(), static_cast<int>(x.shape(0)), out);
    return logits;
  }

  Rows accumulate(const std::string& name, In<int8_t, 2> q) {
    ready(true);
    const Linear& linear = model_.linear(name);
    require(q.shape(1) == static_cast<size_t>(linear.inputs()),
            name + " takes rows of " + std::to_string(linear.inputs()));
    Rows out = new_array<int32_t>(q.shape(0), linear.outputs());
    model_.accumulate(name, q.data(), static_cast<int>(q.shape(0)), out.data());
    return out;
  }

  // (rows, logits) of the walk of a layer's FFF
  std::pair<Rows, Array> walk(int layer, Floats x) {
    ready(true);
    require(layer >= 0 && layer < model_.layers() && model_.active(layer) != 0 &&
                x.shape(1) == static_cast<size_t>(model_.hidden()),
            "walk takes a layer that has trees, and x [T, hidden]");
    Rows rows = new_array<int32_t>(x.shape(0), model_.active(layer));
    auto logits = new_array<float>(x.shape(0), model_.active(layer));
    {
      int32_t* path = rows.data();
      float* values = logits.data();
      // Without the GIL: a step of another thread holds the model's lock and asks for the GIL.
      nb::gil_scoped_release release;
      model_.walk(layer, x.data(), static_cast<int>(x.shape(0)), path, values);
    }
    return {rows, logits};
  }

  const Model& model() const { return model_; }

 private:
  // Before each call, with the GIL held.
  void ready(bool causal) {
    require(model_.causal() == causal,
            causal ? "the model is an encoder: call encode" : "the model is a decoder: call step");
    model_.tensors().check_complete();
    model_.own_process();
  }

  // Lets Ctrl-C stop a long step; looks at most ten times a second. When the step is done it looks
  // with the GIL, which it keeps: Python raises what came while the step ran right behind the call,
  // and a step that raises must not count.
  static Poll poll(Released* released) {
    using Clock = std::chrono::steady_clock;
    auto last = std::make_shared<Clock::time_point>(Clock::now());
    return [last, released](bool done) {
      if (done) {
        released->end();
        if (PyErr_CheckSignals() != 0) throw nb::python_error();
        return;
      }
      if (Clock::now() - *last < std::chrono::milliseconds(100)) return;
      *last = Clock::now();
      nb::gil_scoped_acquire acquire;
      if (PyErr_CheckSignals() != 0) throw nb::python_error();
    };
  }

  Model model_;
  // Arrays that the graph reads in place; models that share it let go of them with the GIL, too.
  std::shared_ptr<std::vector<nb::object>> kept_;
};

}  // namespace

void bind_model(nb::module_& m) {
  nb::class_<BoundModel>(m, "Model")
      .def(nb::init<nb::dict, const IsaName&, int>(), "description"_a, "isa"_a.none(), "threads"_a)
      .def("set", &BoundModel::set, "name"_a, "array"_a)
      .def("check_complete", [](const BoundModel& b) { b.model().tensors().check_complete(); })
      .def("step", &BoundModel::step, "states"_a, "pages"_a, "ids"_a, "want"_a, "profile"_a = false)
      .def("with_threads", &BoundModel::with_threads, "threads"_a)
      .def("pages", &BoundModel::pages)
      .def("encode", &BoundModel::encode, "ids"_a, "offsets"_a, "seen"_a.none() = nb::none(),
           "paths"_a = false, "profile"_a = false)
      .def("block", &BoundModel::block, "layer"_a, "x"_a, "state"_a)
      .def("logits_of", &BoundModel::logits_of, "x"_a)
      .def("accumulate", &BoundModel::accumulate, "name"_a, "q"_a)
      .def("walk", &BoundModel::walk, "layer"_a, "x"_a)
      .def_prop_ro("isa", [](const BoundModel& b) { return b.model().isa().name; })
      .def_prop_ro("threads", [](const BoundModel& b) { return b.model().threads(); })
      .def_prop_ro("scratch_bytes", [](const BoundModel& b) { return b.model().scratch_bytes(); });
}

}  // namespace nomatmul
