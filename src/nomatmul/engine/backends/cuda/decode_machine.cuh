// What decode.cu asks of the machine in assembly. tests/engine/emulate_cuda.h has the same for a
// CPU.
#pragma once

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned char u8;

#ifndef STAMPS
#define STAMP(s, step)
#define STAMP_PHASE(s, n)
#define STAMP_GATHERED(s)
#endif
#ifdef NOMATMUL_EMULATED
#define SHARED_MEMORY(name) char* name = emulated_shared()
#else
#define SHARED_MEMORY(name) extern __shared__ __align__(16) char name[]

// With -DSTAMPS thread 0 of each block writes down when it passes each step of each phase.
#ifdef STAMPS
__device__ u64 stamps[BLOCKS][4 * L + 1][12];
template <class S>
__device__ __forceinline__ void stamp(S& s, int step) {
  if (threadIdx.x == 0) stamps[blockIdx.x][s.stamped][step] = clock64();
}
template <class S>
__device__ __forceinline__ void stamp_time(S& s, int phase) {
  if (threadIdx.x == 0) {
    u64 now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    s.stamped = phase;
    stamps[blockIdx.x][phase][11] = now;
  }
}
#define STAMP(s, step) stamp(s, step)
#define STAMP_PHASE(s, n) stamp_time(s, n)
#define STAMP_GATHERED(s) (stamp(s, 1), sync_workers(), stamp(s, 2))
#endif

// A word that other blocks wait for, and four of them. They are their own "it is there".
__device__ __forceinline__ void write_item(u32* at, u32 value) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(at), "r"(value) : "memory");
}
// Reads four words again if `missing`. One predicated access: those of a thread overlap.
__device__ __forceinline__ void read_items(const u32* at, bool missing, uint4& v) {
  asm volatile(
      "{ .reg .pred p; setp.ne.u32 p, %5, 0; @p ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, "
      "[%4]; }"
      : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
      : "l"(at), "r"((u32)missing)
      : "memory");
}
__device__ __forceinline__ uint4 load_weights(const u8* at) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(at));
  return v;
}

// A load that stays where it is written: far ahead of its use.
__device__ __forceinline__ float load_now(const float* at) {
  float v;
  asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(v) : "l"(at));
  return v;
}

// sum + the products of four unsigned bytes with four signed ones.
__device__ __forceinline__ int dot(u32 bytes, u32 values, int sum) {
  asm("dp4a.u32.s32 %0, %1, %2, %0;" : "+r"(sum) : "r"(bytes), "r"(values));
  return sum;
}
// Bytes of a and b, 0..7, by the nibbles of `which`; 8 more: that byte's sign, eight times.
__device__ __forceinline__ u32 bytes_of(u32 a, u32 b, u32 which) {
  u32 v;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(v) : "r"(a), "r"(b), "r"(which));
  return v;
}

// Barriers of a part of the block.
__device__ __forceinline__ void sync_some(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
__device__ __forceinline__ void arrive_only(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// Copies into shared memory by one warp, and the barrier that they arrive at: `expect` by one lane
// with the bytes of all lanes, `copy` by any, `asked` by every lane once it has asked for its own.
__device__ __forceinline__ u32 shared_at(const void* at) {
  return (u32)__cvta_generic_to_shared(at);
}
__device__ __forceinline__ void start_barrier(u64* at) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.init.shared.b64 [%0], 1; fence.proxy.async;" ::"r"(shared_at(at))
               : "memory");
#else
  asm volatile("mbarrier.init.shared.b64 [%0], 32;" ::"r"(shared_at(at)) : "memory");
#endif
}
#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ void expect(u64* at, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_at(at)), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void copy(void* to, const void* from, int bytes, u64* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_at(to)),
      "l"(from), "r"(bytes), "r"(shared_at(barrier))
      : "memory");
}
__device__ __forceinline__ void asked(u64*) {}
__device__ __forceinline__ void prefetch(const void* from, int bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ bool arrived(u64* barrier, u32 parity) {
  u32 done;
  asm volatile(
      "{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
      : "=r"(done)
      : "r"(shared_at(barrier)), "r"(parity)
      : "memory");
  return done;
}
#else
__device__ __forceinline__ void expect(u64*, int) {}
__device__ __forceinline__ void copy(void* to, const void* from, int bytes, u64*) {
  for (int n = 0; n < bytes; n += 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_at(to) + n),
                 "l"((const u8*)from + n)
                 : "memory");
}
__device__ __forceinline__ void prefetch(const void*, int) {}
__device__ __forceinline__ void asked(u64* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_at(barrier))
               : "memory");
}
__device__ __forceinline__ bool arrived(u64* barrier, u32 parity) {
  u32 done;
  asm volatile(
      "{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
      : "=r"(done)
      : "r"(shared_at(barrier)), "r"(parity)
      : "memory");
  return done;
}
#endif
__device__ __forceinline__ void wait_for_copies(u64* barrier, u32 parity) {
  while (!arrived(barrier, parity)) {
  }
}
#endif
