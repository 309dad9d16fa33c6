// nomatmul._native.Pages: the keys and values of one sequence.
#include "core/pages.h"

#include "bindings/common.h"

namespace nomatmul {
namespace {

using Values = nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu, nb::ndim<3>>;

Pages::Piece piece_of(const std::string& name) {
  return choose<Pages::Piece>("piece", name,
                              {{"k", Pages::Piece::kKeys}, {"v", Pages::Piece::kValues}});
}

void check_layer(const Pages& pages, int layer) {
  require(layer >= 0 && layer < pages.layout().layers, "layer is out of range");
}

size_t room(const Pages& pages) { return pages.addresses().size() * kPagePositions; }

void reserve(Pages& pages, int count) {
  require(count >= 0, "count is below 0");
  pages.reserve(count);
}

void advance(Pages& pages, int count) {
  require(count >= 0 && static_cast<size_t>(pages.length()) + count <= room(pages),
          "no room for so many positions");
  pages.advance(count);
}

void roll_back(Pages& pages, int length) {
  require(length >= 0 && length <= pages.length(), "length is out of range");
  pages.roll_back(length);
}

// (stored values [P, kv heads, E] as float16 bits, int8 or float32, scales [P, kv heads] of int8 or
// None)
nb::tuple save(const Pages& pages, int layer, const std::string& name) {
  check_layer(pages, layer);
  const int heads = pages.layout().kv_heads, length = pages.length();
  const int size = pages.layout().strip.head_size;
  const auto plain = [&](auto type) {
    auto values = new_array<decltype(type)>(length, heads, size);
    pages.save(layer, piece_of(name), values.data(), nullptr);
    return nb::make_tuple(values, nb::none());
  };
  if (pages.layout().strip.form == KvForm::kHalf) return plain(uint16_t{});
  if (pages.layout().strip.form == KvForm::kFloat) return plain(float{});
  auto values = new_array<int8_t>(length, heads, size);
  auto scales = new_array<float>(length, heads);
  pages.save(layer, piece_of(name), values.data(), scales.data());
  return nb::make_tuple(values, scales);
}

// Fills positions of new pages that are reserved and do not count yet.
void load(Pages& pages, int layer, const std::string& name, Values values,
          std::optional<In<float, 2>> scales) {
  check_layer(pages, layer);
  const StripLayout& strip = pages.layout().strip;
  const size_t heads = pages.layout().kv_heads, count = values.shape(0);
  const auto type = strip.form == KvForm::kHalf   ? nb::dtype<uint16_t>()
                    : strip.form == KvForm::kInt8 ? nb::dtype<int8_t>()
                                                  : nb::dtype<float>();
  require(values.dtype() == type && values.shape(1) == heads &&
              values.shape(2) == static_cast<size_t>(strip.head_size),
          "values are [P, kv heads, E] in the form of the pages");
  require(scales.has_value() == strip.scaled(), "scales belong to int8");
  require(!strip.scaled() || (scales->shape(0) == count && scales->shape(1) == heads),
          "scales are [P, kv heads]");
  require(pages.length() == 0 && count <= room(pages), "pages are new, with room for the values");
  pages.load(layer, piece_of(name), static_cast<int>(count), values.data(), pointer_of(scales));
}

// Forks that share a page have the same address in both lists.
std::vector<size_t> addresses(const Pages& pages) {
  std::vector<size_t> found;
  for (const uint8_t* page : pages.addresses()) found.push_back(reinterpret_cast<size_t>(page));
  return found;
}

}  // namespace

void bind_pages(nb::module_& m) {
  nb::class_<Pages>(m, "Pages")
      .def("fork", [](const Pages& pages) { return Pages(pages); })
      .def("reserve", &reserve, "count"_a)
      .def("advance", &advance, "count"_a)
      .def("roll_back", &roll_back, "length"_a)
      .def("save", &save, "layer"_a, "piece"_a)
      .def("load", &load, "layer"_a, "piece"_a, "values"_a, "scales"_a.none())
      .def_prop_ro("length", &Pages::length)
      .def_prop_ro("page_positions", [](const Pages&) { return kPagePositions; })
      .def_prop_ro("page_bytes", [](const Pages& pages) { return pages.layout().bytes(); })
      .def_prop_ro("addresses", &addresses);
}

}  // namespace nomatmul
