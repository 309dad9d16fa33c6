"""An accelerator of MatMul-free models: its design, compiler, simulation and synthesis."""
