"""prompt.cu on a CPU: emulate_cuda.h stands in for the GPU, and triton's interpreter for the truth.

Rows, gates and the recurrence of long prompts have the bits of the general path's kernels.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from machine import need_compiler, need_triton
from support.interpreted import run_interpreted

need_triton()

HERE = Path(__file__).parent
DRIVER = """
#include "emulate_cuda.h"
#define __shared__ static
struct int4 { int x, y, z, w; };
struct float2 { float x, y; };
inline thread_local Index gridDim;
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline float reciprocal(float x) { return std::nextafter(1.0f / x, 0.0f); }  // off by an ulp
inline int __float2int_rz(float x) { return (int)x; }
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned which) {
  const unsigned long long both = (unsigned long long)b << 32 | a;
  unsigned out = 0;
  for (int n = 0; n < 4; ++n) out |= (unsigned)(both >> 8 * (which >> 4 * n & 7) & 255) << 8 * n;
  return out;
}
using std::fabs;
#include "prompt.cu"
#include <string>
#include <utility>

template <class... A, size_t... I>
void call(void (*kernel)(A...), void** values, std::index_sequence<I...>) {
  kernel(*static_cast<std::remove_cv_t<A>*>(values[I])...);
}
template <class... A>
void run(void (*kernel)(A...), int across, int down, int threads, void** values) {
  for (int y = 0; y < down; ++y)
    for (int x = 0; x < across; ++x) {
      emulated::Block block(threads);
      std::vector<std::thread> all;
      for (int t = 0; t < threads; ++t)
        all.emplace_back([=, &block] {
          emulated::block = &block, blockIdx = {x, y}, threadIdx = {t, 0}, gridDim = {across, down};
          call(kernel, values, std::index_sequence_for<A...>());
        });
      for (auto& thread : all) thread.join();
    }
}
extern "C" void launch(const char* name, int across, int down, int threads, void** values) {
#define KERNEL(kernel) if (std::string(name) == #kernel) run(kernel, across, down, threads, values)
  KERNEL(norm1); KERNEL(norm3); KERNEL(gate_norm); KERNEL(glu_norm); KERNEL(scan); KERNEL(unpack);
}
"""

PROGRAM = """
import ctypes, sys, types
import numpy as np
import torch
from nomatmul.engine.backends.cuda import launch
from nomatmul.engine.backends.cuda.prompt import Prompt, row_threads
from nomatmul.formats.quantise import quantise_activation
from nomatmul.reference.ops import rms_norm

D, M = map(int, sys.argv[2:])
T, R = 150, 5  # tokens of the recurrence, and of all else
library = ctypes.CDLL(sys.argv[1])
torch.cuda.current_stream = lambda: types.SimpleNamespace(cuda_stream=0)

class Emulated:
    def __init__(self, name):
        self.name = name.encode()

    def launch(self, grid, threads, arguments, stream):
        places = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
        library.launch(self.name, *grid, threads, places)

prompt = Prompt.__new__(Prompt)
prompt.size, prompt.threads_d, prompt.threads_m = D, row_threads(D), row_threads(M)
names = ("norm1", "norm3", "gate_norm", "scan", "unpack", "glu_norm")
prompt.kernels = {name: Emulated(name) for name in names}
random = torch.Generator().manual_seed(3)
normal = lambda *shape: torch.randn(shape, generator=random)
integers = lambda *shape: torch.randint(-900, 900, shape, generator=random, dtype=torch.int32)
flag, EPS = torch.zeros(1, dtype=torch.int32), 1e-6
RB, RBM = -(-D // 256) * 64, -(-M // 256) * 64

def same(found, expected):
    np.testing.assert_array_equal(found.numpy(), expected.numpy())

def quantised(found, expected):
    same(found.q_CTK, expected.q_CTK)
    same(found.step_CT, expected.step_CT)

for linears, added in ((3, None), (1, (integers(R, D), normal(1, R).abs(), 0.37))):
    x, norm, norms = normal(R, D), 1 + normal(D) / 9, 1 + normal(linears, D) / 9
    other = x.clone()
    expected = launch.residual_norm(other, added, norm, EPS, norms, EPS, RB, flag)
    quantised(prompt.norm(x, added, norm, norms, RB, flag), expected)
    same(x, other)

acc, steps, w_scales = integers(3, T, D), normal(3, T).abs() / 99, (0.3, 1.4, 0.5)
acc[:2, 1] *= 40  # sigmoids beyond both ends
states, bound = normal(2, 2, D), torch.rand(D, generator=random)
pieces = torch.tensor([1, 0], dtype=torch.int32)
starts = torch.tensor([0, 7, T - 2], dtype=torch.int32)  # two rows that nobody reads
found, expected_states = acc.clone(), states.clone()
i, f, g = launch.gates(acc, steps, w_scales, bound)
assert i.view(torch.int32).ne(found[0]).any()
launch.scan(i, f, expected_states, 1, launch.Stretches(pieces, starts, T))
h = prompt.scan(
    found, steps, w_scales, bound, states[:, 1], launch.Stretches(pieces, starts, T)
)
same(h[: T - 2], i[: T - 2])
assert not h[T - 2 :].any()
same(states, expected_states)
norm, norms = 1 + normal(D) / 9, 1 + normal(1, D) / 9
expected = launch.gate_norm(g[:R], h[:R], norm, EPS, norms, EPS, RB, flag)
gated = prompt.gate_norm(found[2], steps[2], w_scales[2], h[:R], norm, norms, RB, flag)
quantised(gated, expected)

y, norms = normal(R, M), 1 + normal(1, M) / 9
hidden = prompt.glu_norm(y, norms, RBM, flag)
q, step = quantise_activation(rms_norm(y.numpy(), norms[0].numpy(), EPS))
planes = hidden.q_CTK[0].numpy().reshape(R, 4, RBM).swapaxes(1, 2).reshape(R, -1)
np.testing.assert_array_equal(planes[:, :M], q)
assert not planes[:, M:].any()
np.testing.assert_array_equal(hidden.step_CT[0].numpy(), step.reshape(-1))
assert not flag
y[1, 2] = float("nan")
prompt.glu_norm(y, norms, RBM, flag)
assert flag

w = torch.randint(0, 256, (2 * M, RB), generator=random, dtype=torch.uint8)
w &= ~((w & (w >> 1) & 0x55) << 1)
codes = np.stack([w.numpy() >> 2 * plane & 3 for plane in range(4)], axis=1).astype(np.int8) - 1
scratch = torch.full((4 * RB * (2 * M + 64),), 9, dtype=torch.int8)
np.testing.assert_array_equal(prompt._unpack(w, 2 * M, scratch).numpy(), codes.reshape(2 * M, -1))
half, begin = 8, 16
blocks = -(-(M - begin) // half)
turns = prompt._unpack(w, 2 * half * blocks, scratch, half, begin)
turns = turns.numpy().reshape(blocks, 2, half, -1).swapaxes(0, 1).reshape(2, blocks * half, -1)
expected = codes.reshape(2, M, -1)[:, begin:]
np.testing.assert_array_equal(turns[:, : M - begin], expected)
"""


def test_rows_and_recurrence_have_the_bits_of_the_general_path(
    tmp_path: Path, interpreting_python: str
) -> None:
    from nomatmul.engine.backends.cuda import prompt
    from nomatmul.engine.backends.cuda.plan import Plan
    from nomatmul.formats.config import ModelConfig

    compiler = need_compiler("g++")
    config = ModelConfig(
        vocab_size=67, hidden_size=20, num_layers=2, intermediate_size=300, gate_norm_eps=1e-6
    )
    source, library = tmp_path / "driver.cc", tmp_path / "driver.so"
    source.write_text(DRIVER)
    macros = [f"-D{name}={value}" for name, value in prompt.defines(Plan.of(config)).items()]
    places = [f"-I{HERE}", f"-I{Path(prompt.__file__).parent}"]
    flags = ["-std=c++20", "-O1", "-ffp-contract=off", "-w", "-shared", "-fPIC", "-pthread"]
    command = [compiler, *flags, "-DNOMATMUL_EMULATED", *macros, *places, str(source)]
    command += ["-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    run_interpreted(interpreting_python, PROGRAM, library, 20, 300)
