// Runs decode.cu on a CPU, a thread for each thread of the GPU: slow, but it computes what the kernel
// says, barriers, shuffles and the matrix unit's fragments included. For tests of tiny models.
#pragma once

#include <atomic>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#define __host__
#define __device__
#define __global__
#define __constant__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct Index { int x, y; };
struct uint4 { unsigned x, y, z, w; };
struct float4 { float x, y, z, w; };
inline thread_local Index blockIdx, threadIdx;

namespace emulated {
// std::barrier spins first, which starves the others where threads outnumber processors.
class Barrier {
 public:
  explicit Barrier(int threads = 0) : threads_(threads) {}
  void arrive_and_wait() { arrive(threads_, true); }
  void arrive(int threads, bool wait) {
    std::unique_lock<std::mutex> lock(mutex_);
    const int round = round_;
    if (++arrived_ == threads) {
      arrived_ = 0, ++round_;
      changed_.notify_all();
    } else if (wait) {
      changed_.wait(lock, [&] { return round_ != round; });
    }
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  int threads_, arrived_ = 0, round_ = 0;
};
// What copies arrive at: those of even lanes are made as late as they may be.
struct Copy { void* to; const void* from; int bytes; };
class Copies {
 public:
  void expect(int bytes) {
    const std::lock_guard<std::mutex> guard(mutex_);
    expected_ = bytes;
    changed_.notify_all();
  }
  void add(const Copy& copy, bool late) {
    const std::lock_guard<std::mutex> guard(mutex_);
    if (late) late_.push_back(copy);
    else std::memcpy(copy.to, copy.from, copy.bytes);
    asked_ += copy.bytes;
    changed_.notify_all();
  }
  void wait(unsigned parity) {
    std::unique_lock<std::mutex> lock(mutex_);
    const auto passed = [&] { return round_ % 2 != parity; };
    changed_.wait(lock, [&] { return passed() || (expected_ >= 0 && asked_ == expected_); });
    if (passed()) return;
    for (const auto& copy : late_) std::memcpy(copy.to, copy.from, copy.bytes);
    late_.clear();
    asked_ = 0, expected_ = -1, ++round_;
    changed_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<Copy> late_;
  int asked_ = 0, expected_ = -1;
  unsigned round_ = 0;
};
struct Warp {
  Barrier barrier{32};
  alignas(16) unsigned char slots[32][32];
};
struct Block {
  explicit Block(int threads) : barrier(threads), warps(threads / 32), shared(1 << 20) {}
  Barrier barrier, some[16];
  Copies copies[4];
  std::vector<Warp> warps;
  std::vector<char> shared;
};
inline thread_local Block* block;
inline std::mutex locks[64];
inline std::mutex& lock_of(const void* at) { return locks[(uintptr_t)at / 16 % 64]; }

// Every lane gives a value and then sees those of all lanes.
template <class T, class Use>
auto collective(const T& value, Use use) {
  Warp& warp = block->warps[threadIdx.x >> 5];
  std::memcpy(warp.slots[threadIdx.x & 31], &value, sizeof value);
  warp.barrier.arrive_and_wait();
  const auto result = use([&warp](int lane) {
    T other;
    std::memcpy(&other, warp.slots[lane], sizeof other);
    return other;
  });
  warp.barrier.arrive_and_wait();
  return result;
}
}  // namespace emulated

inline char* emulated_shared() { return emulated::block->shared.data(); }
inline void __syncthreads() { emulated::block->barrier.arrive_and_wait(); }
inline void __syncwarp() { emulated::block->warps[threadIdx.x >> 5].barrier.arrive_and_wait(); }
inline void sync_some(int barrier, int threads) {
  emulated::block->some[barrier].arrive(threads, true);
}
inline void arrive_only(int barrier, int threads) {
  emulated::block->some[barrier].arrive(threads, false);
}
inline void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }
template <class T> T __shfl_sync(unsigned, T v, int from) {
  return emulated::collective(v, [&](auto of) { return of(from & 31); });
}
template <class T> T __shfl_xor_sync(unsigned, T v, int step) {
  return emulated::collective(v, [&](auto of) { return of((threadIdx.x & 31) ^ step); });
}
inline unsigned __reduce_max_sync(unsigned, unsigned v) {
  return emulated::collective(v, [](auto of) {
    unsigned top = 0;
    for (int lane = 0; lane < 32; ++lane) top = of(lane) > top ? of(lane) : top;
    return top;
  });
}
inline int __reduce_add_sync(unsigned, int v) {
  return emulated::collective(v, [](auto of) {
    int sum = 0;
    for (int lane = 0; lane < 32; ++lane) sum += of(lane);
    return sum;
  });
}
inline unsigned __float_as_uint(float v) { unsigned u; std::memcpy(&u, &v, 4); return u; }
inline float __uint_as_float(unsigned u) { float v; std::memcpy(&v, &u, 4); return v; }
inline double __hiloint2double(int high, int low) {
  const uint64_t bits = (uint64_t)(uint32_t)high << 32 | (uint32_t)low;
  double v;
  std::memcpy(&v, &bits, 8);
  return v;
}
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
// Toward zero, for a positive sum that a double holds.
inline float __fadd_rz(float a, float b) {
  const double sum = (double)a + (double)b;
  const float near = (float)sum;
  return (double)near > sum ? std::nextafter(near, 0.0f) : near;
}
inline int __dp4a(int a, int b, int sum) {
  for (int n = 0; n < 32; n += 8) sum += (int)(int8_t)(a >> n) * (int)(int8_t)(b >> n);
  return sum;
}
template <class T> T __ldg(const T* at) { return *at; }
template <class T> T min(T a, T b) { return a < b ? a : b; }
template <class T> T max(T a, T b) { return a > b ? a : b; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
template <class T, class U> T atomicAdd(T* at, U v) { return std::atomic_ref<T>(*at).fetch_add((T)v); }
template <class T> T atomicExch(T* at, T v) { return std::atomic_ref<T>(*at).exchange(v); }
inline void atomicMax(unsigned long long* at, unsigned long long v) {
  std::atomic_ref<unsigned long long> ref(*at);
  for (unsigned long long old = ref; old < v && !ref.compare_exchange_weak(old, v);) {}
}
using std::fabs;
using std::fmaxf;

// What decode_machine.cuh writes in assembly.
inline void write_item(unsigned* at, unsigned value) {
  std::atomic_ref<unsigned>(*at).store(value);
}
inline void read_items(const unsigned* at, bool missing, uint4& v) {
  if (!missing) return;
  std::this_thread::sleep_for(std::chrono::microseconds(50));
  unsigned words[4];
  for (int n = 0; n < 4; ++n)
    words[n] = std::atomic_ref<unsigned>(const_cast<unsigned&>(at[n])).load();
  v = {words[0], words[1], words[2], words[3]};
}
inline uint4 load_weights(const unsigned char* at) {
  uint4 v;
  std::memcpy(&v, at, 16);
  return v;
}
inline unsigned bytes_of(unsigned a, unsigned b, unsigned which) {
  const uint64_t both = (uint64_t)b << 32 | a;
  unsigned out = 0;
  for (int n = 0; n < 4; ++n) {
    const unsigned nibble = which >> (4 * n) & 15, byte = both >> (8 * (nibble & 7)) & 255;
    out |= (nibble & 8 ? (byte & 128 ? 255 : 0) : byte) << (8 * n);
  }
  return out;
}
// The four barriers that copies arrive at lie side by side.
inline emulated::Copies& copies_of(unsigned long long* at) {
  return emulated::block->copies[(uintptr_t)at / 8 % 4];
}
inline void start_barrier(unsigned long long*) {}
inline void expect(unsigned long long* at, int bytes) { copies_of(at).expect(bytes); }
inline void copy(void* to, const void* from, int bytes, unsigned long long* at) {
  copies_of(at).add({to, from, bytes}, threadIdx.x % 2 == 0);
}
inline void prefetch(const void*, int) {}
inline float load_now(const float* at) { return *at; }
inline void asked(unsigned long long*) {}
inline void wait_for_copies(unsigned long long* at, unsigned parity) { copies_of(at).wait(parity); }
inline int dot(unsigned bytes, unsigned values, int sum) {
  for (int n = 0; n < 32; n += 8)
    sum += (int)(bytes >> n & 255) * (int)(int8_t)(values >> n & 255);
  return sum;
}
