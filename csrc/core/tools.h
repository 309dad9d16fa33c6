// Small tools around the model: random weights for benchmarks, and the machine's read bandwidth.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/isa.h"

namespace nomatmul {

// Fills rows of k elements with random legal codes, padding included (value 0). Every third value
// is zero on average, as in a trained model. The same seed gives the same bytes.
void random_codes(Packing packing, uint8_t* rows, int count, int k, uint64_t seed);
void random_bytes(uint8_t* out, size_t count, uint64_t seed);

// True when every code is legal and the padding behind k elements is zero weights.
bool rows_ok(Packing packing, const uint8_t* rows, int count, int k);

// Bytes per second at which `threads` threads read a buffer of 2 MiB pages; best of `passes`.
double read_bandwidth(size_t bytes, int threads, int passes);

}  // namespace nomatmul
