"""The engine on a GPU: packed weights stay two bits in device memory. Needs torch and triton.

Imported only when a device is asked for (`nomatmul.load(..., device="cuda")`). `kernels.py` holds
the general path in triton (any number of tokens and sequences, compute capability 7.5 and up),
`decode.cu` one persistent kernel that computes a whole token of one sequence (8.0 and up),
`prompt.cu` what lies between the products of a long prompt; `nvrtc.py` compiles them at run time.
All do the float steps of csrc/kernels/common/float_ops.h operation by operation, without
contraction into fused multiply-adds, so they have the bits of the native core.
"""
