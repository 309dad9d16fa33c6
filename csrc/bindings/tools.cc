// Memory, threads and tools around the model.
#include <cstdint>

#include "bindings/common.h"
#include "core/memory.h"
#include "core/thread_pool.h"
#include "core/tools.h"

namespace nomatmul {
namespace {

void check_rows(Packing packing, size_t row_bytes, int k) {
  if (k < 1 || k > kMaxElements || row_bytes != row_bytes_of(packing, k)) {
    throw std::invalid_argument("rows do not have the length that k elements need");
  }
}

}  // namespace

void bind_tools(nb::module_& m) {
  nb::class_<Block>(m, "Arena", "Zeroed memory in 2 MiB pages where the system grants them.")
      .def(nb::init<size_t>(), "nbytes"_a)
      .def_prop_ro("nbytes", &Block::size)
      .def_prop_ro("address", [](const Block& b) { return reinterpret_cast<uintptr_t>(b.data()); })
      .def(
          "view",
          [](nb::object self) {
            const Block& block = nb::cast<const Block&>(self);
            return nb::ndarray<nb::numpy, uint8_t>(block.data(), {block.size()}, self);
          },
          "The memory as a writable uint8 array that keeps it alive.");
  m.def("default_threads", &default_threads);
  m.def("read_bandwidth", &read_bandwidth, "nbytes"_a, "threads"_a, "passes"_a,
        nb::call_guard<nb::gil_scoped_release>());
  m.def(
      "random_codes",
      [](const std::string& packing, Out<uint8_t, 2> rows, int k, uint64_t seed) {
        const Packing form = packing_of(packing);
        check_rows(form, rows.shape(1), k);
        nb::gil_scoped_release release;
        random_codes(form, rows.data(), static_cast<int>(rows.shape(0)), k, seed);
      },
      "packing"_a, "rows"_a, "k"_a, "seed"_a);
  m.def(
      "rows_ok",
      [](const std::string& packing, In<uint8_t, 2> rows, int k) {
        const Packing form = packing_of(packing);
        check_rows(form, rows.shape(1), k);
        nb::gil_scoped_release release;
        return rows_ok(form, rows.data(), static_cast<int>(rows.shape(0)), k);
      },
      "packing"_a, "rows"_a, "k"_a, "Whether all codes are legal and the padding is zero weights.");
  m.def(
      "random_bytes",
      [](Out<uint8_t, 1> out, uint64_t seed) {
        nb::gil_scoped_release release;
        random_bytes(out.data(), out.shape(0), seed);
      },
      "out"_a, "seed"_a);
}

}  // namespace nomatmul
