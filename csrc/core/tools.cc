#include "core/tools.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>

#include "core/memory.h"
#include "core/thread_pool.h"

namespace nomatmul {
namespace {

// splitmix64: every counter value gives independent bits, so rows could be filled in any order.
uint64_t mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// The byte of the first `digits` digits of `number`, the others being code 1 (value 0).
uint8_t encode(Packing packing, int number, int digits) {
  if (packing == Packing::kTwoBit) {
    int byte = 0;
    for (int j = 0; j < 4; ++j) {
      const int code = j < digits ? number % 3 : 1;
      number /= 3;
      byte |= code << (2 * j);
    }
    return static_cast<uint8_t>(byte);
  }
  int value = 0;
  for (int j = 0; j < 5; ++j) {
    const int digit = j < digits ? number % 3 : 1;
    number /= 3;
    value = value * 3 + digit;
  }
  return static_cast<uint8_t>((value * 256 + 242) / 243);
}

// Whether the digits behind the first `digits` of a byte are code 1 (value 0).
bool tail_is_zero(Packing packing, uint8_t byte, int digits) {
  if (packing == Packing::kTwoBit) return byte >> (2 * digits) == 0x55 >> (2 * digits);
  int rest = byte;
  for (int j = 0; j < 5; ++j) {
    rest *= 3;
    if (j >= digits && rest >> 8 != 1) return false;
    rest &= 255;
  }
  return true;
}

// The sum of a stretch of memory, 64 bytes at a time: one core adds several times as fast as any
// memory delivers, with the vectors that every CPU has.
uint64_t sum_of(const char* data, size_t count) {
  typedef uint64_t Pair __attribute__((vector_size(16), aligned(16), may_alias));
  const Pair* p = reinterpret_cast<const Pair*>(data);
  Pair a = {}, b = {}, c = {}, d = {};
  for (size_t i = 0; i + 4 <= count / 16; i += 4) {
    a += p[i], b += p[i + 1], c += p[i + 2], d += p[i + 3];
    __builtin_prefetch(data + (i + 64) * 16);
  }
  const Pair sum = a + b + c + d;
  return sum[0] + sum[1];
}

}  // namespace

void random_codes(Packing packing, uint8_t* rows, int count, int k, uint64_t seed) {
  const int per_byte = packing == Packing::kTwoBit ? 4 : 5;
  const int numbers = packing == Packing::kTwoBit ? 81 : 243;
  const size_t row_bytes = row_bytes_of(packing, k);
  uint8_t table[256];
  for (int i = 0; i < 256; ++i) table[i] = encode(packing, i * numbers / 256, per_byte);
  const size_t full = k / per_byte;
  const int rest = k % per_byte;
  const uint8_t zero = encode(packing, 0, 0);
  for (int n = 0; n < count; ++n) {
    uint8_t* row = rows + n * row_bytes;
    for (size_t i = 0; i < full; i += 8) {
      uint64_t bits = mix(seed + n * row_bytes + i);
      for (size_t j = i; j < std::min(i + 8, full); ++j, bits >>= 8) row[j] = table[bits & 255];
    }
    size_t at = full;
    if (rest != 0) {
      const int number = static_cast<int>(mix(~seed + n) % static_cast<uint64_t>(numbers));
      row[at++] = encode(packing, number, rest);
    }
    std::memset(row + at, zero, row_bytes - at);
  }
}

void random_bytes(uint8_t* out, size_t count, uint64_t seed) {
  for (size_t i = 0; i < count; i += 8) {
    const uint64_t bits = mix(seed + i);
    std::memcpy(out + i, &bits, std::min<size_t>(8, count - i));
  }
}

bool rows_ok(Packing packing, const uint8_t* rows, int count, int k) {
  const size_t row_bytes = row_bytes_of(packing, k);
  const Isa* best = find_isa(available_isas().front().c_str());
  if (!best->ternary->codes_ok(packing, rows, row_bytes * count)) return false;
  const int per_byte = packing == Packing::kTwoBit ? 4 : 5;
  const size_t full = k / per_byte;
  const int rest = k % per_byte;
  const uint8_t zero = encode(packing, 0, 0);
  for (int n = 0; n < count; ++n) {
    const uint8_t* row = rows + n * row_bytes;
    size_t at = full;
    if (rest != 0 && !tail_is_zero(packing, row[at++], rest)) return false;
    for (; at < row_bytes; ++at) {
      if (row[at] != zero) return false;
    }
  }
  return true;
}

double read_bandwidth(size_t bytes, int threads, int passes) {
  constexpr size_t kTask = size_t{1} << 20;
  const int tasks = static_cast<int>(std::max<size_t>(1, bytes / kTask));
  Block block(tasks * kTask);
  std::memset(block.data(), 1, block.size());
  ThreadPool pool(threads);
  std::atomic<uint64_t> total{0};
  double best = 0;
  for (int pass = 0; pass < std::max(1, passes); ++pass) {
    const auto start = std::chrono::steady_clock::now();
    pool.run(tasks, [&](int task, int) {
      total.fetch_add(sum_of(block.as<char>() + task * kTask, kTask), std::memory_order_relaxed);
    });
    const std::chrono::duration<double> time = std::chrono::steady_clock::now() - start;
    best = std::max(best, tasks * static_cast<double>(kTask) / time.count());
  }
  return total.load() == 0 ? 0 : best;  // the sum is used, so that no compiler drops the reads
}

}  // namespace nomatmul
