// What lies between the ternary products of a block of tokens: norms with their quantisers, a block of
// threads for each token, and MLGRU's gates with its recurrence. Rows are read once and kept in
// registers; the triton kernels that do the same for any size and few tokens pad rows to a power of two.
//
// Float steps are those of csrc/kernels/common/float_ops.h, operation by operation (compile with
// --fmad=false), so results have the bits of the native core and of the triton path.
//
// int8 values lie by planes, as kernels.py says: element e at plane e % 4, place e / 4.
//
// Defined by the host: D, M (0: no GLU) multiples of 4, THREADS_D, THREADS_M that share a row of them
// (multiples of 32), NORM_EPS, LINEAR_EPS, GATE_EPS.

#include "float_steps.cuh"

typedef unsigned int u32;

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// A row of K elements, padded to K4 = 4 * places: a thread has `per` groups of four neighbours.
template <int K>
struct Row {
  static constexpr int places = ceil_div(K, 256) * 64;
  static constexpr int threads = K == D ? THREADS_D : THREADS_M, warps = threads / 32;
  static constexpr int per = ceil_div(places, threads);
};
extern "C" __constant__ int shared_bytes = 0;  // beyond what the kernels declare

// x / root, correctly rounded, given 1 / root: Markstein's theorem, as kernels.py explains.
__device__ __forceinline__ float divided(float x, float root, float inverse) {
  const float near = x * inverse;
  return __fmaf_rn(__fmaf_rn(-near, root, x), inverse, near);
}

// sqrt(mean of squares + eps) of the block's row.
template <int K>
__device__ __forceinline__ float root_of(const float (&y)[Row<K>::per][4], float eps, double* sums) {
  double part[4] = {};
#pragma unroll
  for (int j = 0; j < Row<K>::per; ++j)
#pragma unroll
    for (int n = 0; n < 4; ++n) part[n] += (double)(y[j][n] * y[j][n]);
  double total = (part[0] + part[1]) + (part[2] + part[3]);
  for (int step = 16; step; step /= 2) total += __shfl_xor_sync(~0u, total, step);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = total;
  __syncthreads();
  total = 0;
#pragma unroll
  for (int w = 0; w < Row<K>::warps; ++w) total += sums[w];
  return __fsqrt_rn((float)(total / (double)K) + eps);
}

// Byte n of the lane's word becomes byte `lane % 4` of the word of lane n, in each group of four lanes.
__device__ __forceinline__ u32 transposed(u32 word) {
  u32 other = __shfl_xor_sync(~0u, word, 1);
  word = __byte_perm(word, other, threadIdx.x & 1 ? 0x3715 : 0x6240);
  other = __shfl_xor_sync(~0u, word, 2);
  return __byte_perm(word, other, threadIdx.x & 2 ? 0x3276 : 0x5410);
}

__device__ __forceinline__ u32 rounded(float z, float s) {
  const float v = z * s;
  const int whole = __float2int_rz(v + (v < 0.0f ? -0.49999997f : 0.49999997f));
  return (u32)min(max(whole, -128), 127) & 255u;
}

__device__ __forceinline__ float4 load4(const float* at, int place) {
  return __ldg(reinterpret_cast<const float4*>(at) + place);
}

// Norm and int8 values of the block's row for each of C linears; ends with y changed.
template <int K, int C>
__device__ __forceinline__ void emit(float (&y)[Row<K>::per][4], const float* w2, signed char* q,
                                     float* steps, int* flag, int tokens) {
  typedef Row<K> R;
  __shared__ double sums[R::warps];
  __shared__ float tops[C][R::warps];
  const int token = blockIdx.x;
  const float root = root_of<K>(y, LINEAR_EPS, sums), inverse = __frcp_rn(root);
  float top[C] = {};
  bool fine = true;
#pragma unroll
  for (int j = 0; j < R::per; ++j) {
    const int place = j * R::threads + threadIdx.x;
#pragma unroll
    for (int n = 0; n < 4; ++n) y[j][n] = divided(y[j][n], root, inverse);
    if (place < K / 4) {
#pragma unroll
      for (int c = 0; c < C; ++c) {
        const float4 w = load4(w2 + c * K, place);
        const float z[4] = {y[j][0] * w.x, y[j][1] * w.y, y[j][2] * w.z, y[j][3] * w.w};
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          top[c] = fmaxf(top[c], fabsf(z[n]));
          fine = fine && fabsf(z[n]) <= 3.4028234e38f;
        }
      }
    }
  }
  if (!fine) *flag = 1;
#pragma unroll
  for (int c = 0; c < C; ++c) {
    for (int step = 16; step; step /= 2) top[c] = fmaxf(top[c], __shfl_xor_sync(~0u, top[c], step));
    if (threadIdx.x % 32 == 0) tops[c][threadIdx.x / 32] = top[c];
  }
  __syncthreads();
#pragma unroll
  for (int c = 0; c < C; ++c) {
    float most = 1e-5f;
#pragma unroll
    for (int w = 0; w < R::warps; ++w) most = fmaxf(most, tops[c][w]);
    const float s = __fdiv_rn(127.0f, most);
    const size_t row = (size_t)c * tokens + token;
    if (threadIdx.x == 0) steps[row] = __fdiv_rn(most, 127.0f);
    u32* out = reinterpret_cast<u32*>(q + row * (4 * R::places));
#pragma unroll
    for (int j = 0; j < R::per; ++j) {
      const int place = j * R::threads + threadIdx.x;
      float4 w = {};
      if (place < K / 4) w = load4(w2 + c * K, place);
      const u32 word = transposed(rounded(y[j][0] * w.x, s) | rounded(y[j][1] * w.y, s) << 8 |
                                  rounded(y[j][2] * w.z, s) << 16 | rounded(y[j][3] * w.w, s) << 24);
      if (place < R::places) out[(threadIdx.x % 4) * (R::places / 4) + place / 4] = word;
    }
  }
}

// y = divided by its root, times w.
template <int K>
__device__ __forceinline__ void normed(float (&y)[Row<K>::per][4], const float* w, float eps) {
  __shared__ double sums[Row<K>::warps];
  const float root = root_of<K>(y, eps, sums), inverse = __frcp_rn(root);
#pragma unroll
  for (int j = 0; j < Row<K>::per; ++j) {
    const int place = j * Row<K>::threads + threadIdx.x;
    float4 v = {};
    if (place < K / 4) v = load4(w, place);
    y[j][0] = divided(y[j][0], root, inverse) * v.x;
    y[j][1] = divided(y[j][1], root, inverse) * v.y;
    y[j][2] = divided(y[j][2], root, inverse) * v.z;
    y[j][3] = divided(y[j][3], root, inverse) * v.w;
  }
}

// x += acc * (w_scale * step) where given acc; then norm, and int8 for C linears.
template <int C>
__device__ __forceinline__ void residual(float* x, const int* acc, const float* acc_step, float w_scale,
                                         const float* w1, const float* w2, signed char* q,
                                         float* steps, int* flag, int tokens) {
  typedef Row<D> R;
  const int token = blockIdx.x;
  float4* row = reinterpret_cast<float4*>(x + (size_t)token * D);
  float y[R::per][4];
#pragma unroll
  for (int j = 0; j < R::per; ++j) {
    const int place = j * R::threads + threadIdx.x;
    float4 v = {};
    if (place < D / 4) v = row[place];
    y[j][0] = v.x, y[j][1] = v.y, y[j][2] = v.z, y[j][3] = v.w;
  }
  if (acc != nullptr) {
    const float scale = w_scale * acc_step[token];
    const int4* sums = reinterpret_cast<const int4*>(acc + (size_t)token * D);
#pragma unroll
    for (int j = 0; j < R::per; ++j) {
      const int place = j * R::threads + threadIdx.x;
      if (place < D / 4) {
        const int4 a = sums[place];
        y[j][0] = y[j][0] + (float)a.x * scale, y[j][1] = y[j][1] + (float)a.y * scale;
        y[j][2] = y[j][2] + (float)a.z * scale, y[j][3] = y[j][3] + (float)a.w * scale;
        row[place] = make_float4(y[j][0], y[j][1], y[j][2], y[j][3]);
      }
    }
  }
  normed<D>(y, w1, NORM_EPS);
  emit<D, C>(y, w2, q, steps, flag, tokens);
}

extern "C" __global__ void __launch_bounds__(Row<D>::threads)
    norm1(float* x, const int* acc, const float* acc_step, float w_scale, const float* w1,
          const float* w2, signed char* q, float* steps, int* flag, int tokens) {
  residual<1>(x, acc, acc_step, w_scale, w1, w2, q, steps, flag, tokens);
}
extern "C" __global__ void __launch_bounds__(Row<D>::threads)
    norm3(float* x, const int* acc, const float* acc_step, float w_scale, const float* w1,
          const float* w2, signed char* q, float* steps, int* flag, int tokens) {
  residual<3>(x, acc, acc_step, w_scale, w1, w2, q, steps, flag, tokens);
}

// y = norm(g) * silu(h), g = acc * (w_scale * step); then norm and int8.
extern "C" __global__ void __launch_bounds__(Row<D>::threads)
    gate_norm(const int* acc, const float* acc_step, float w_scale, const float* h, const float* w1,
              const float* w2, signed char* q, float* steps, int* flag, int tokens) {
  typedef Row<D> R;
  const size_t start = (size_t)blockIdx.x * D;
  const int4* sums = reinterpret_cast<const int4*>(acc + start);
  const float4* states = reinterpret_cast<const float4*>(h + start);
  const float scale = w_scale * acc_step[blockIdx.x];
  float y[R::per][4], s[R::per][4];
#pragma unroll
  for (int j = 0; j < R::per; ++j) {
    const int place = j * R::threads + threadIdx.x;
    int4 a = {};
    float4 v = {};
    if (place < D / 4) a = sums[place], v = states[place];
    y[j][0] = (float)a.x * scale, y[j][1] = (float)a.y * scale;
    y[j][2] = (float)a.z * scale, y[j][3] = (float)a.w * scale;
    s[j][0] = v.x, s[j][1] = v.y, s[j][2] = v.z, s[j][3] = v.w;
  }
  normed<D>(y, w1, GATE_EPS);
#pragma unroll
  for (int j = 0; j < R::per; ++j)
#pragma unroll
    for (int n = 0; n < 4; ++n) y[j][n] = y[j][n] * silu(s[j][n]);
  emit<D, 1>(y, w2, q, steps, flag, tokens);
}

#if M
// Norm and int8 of y = silu(gate) * up, which the product of gate and up has left.
extern "C" __global__ void __launch_bounds__(Row<M>::threads)
    glu_norm(const float* y_TM, const float* w2, signed char* q, float* steps, int* flag, int tokens) {
  typedef Row<M> R;
  const float4* row = reinterpret_cast<const float4*>(y_TM + (size_t)blockIdx.x * M);
  float y[R::per][4];
#pragma unroll
  for (int j = 0; j < R::per; ++j) {
    const int place = j * R::threads + threadIdx.x;
    float4 v = {};
    if (place < M / 4) v = row[place];
    y[j][0] = v.x, y[j][1] = v.y, y[j][2] = v.z, y[j][3] = v.w;
  }
  emit<M, 1>(y, w2, q, steps, flag, tokens);
}
#endif

// Packed rows to int8 -1, 0, 1 by planes: sixteen bytes a thread. half: 0, or how many rows of gate
// and as many of up take turns in the output, beginning at row `begin` of both; they have `inner`
// rows each, and rows behind those are never used.
extern "C" __global__ void __launch_bounds__(256)
    unpack(const uint4* w, uint4* out, int pieces, int row_pieces, int half, int begin, int inner) {
  const int piece = blockIdx.x * 256 + threadIdx.x;
  if (piece >= pieces) return;
  const int row = piece / row_pieces, column = piece % row_pieces;
  int source = row;
  if (half) source = row / half % 2 * inner + min(begin + row / (2 * half) * half + row % half, inner - 1);
  const uint4 v = w[(size_t)source * row_pieces + column];
  uint4* to = out + (size_t)row * 4 * row_pieces + column;
  const auto codes = [](u32 word, int plane) {  // no byte borrows: its sign bit is set meanwhile
    return (((word >> 2 * plane & 0x03030303u) | 0x80808080u) - 0x01010101u) ^ 0x80808080u;
  };
#pragma unroll
  for (int plane = 0; plane < 4; ++plane)
    to[plane * row_pieces] = make_uint4(codes(v.x, plane), codes(v.y, plane), codes(v.z, plane), codes(v.w, plane));
}

#include "prompt_scan.cuh"
