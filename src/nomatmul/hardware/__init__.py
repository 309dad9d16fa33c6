"""The accelerator: a design in Amaranth, the compiler of packed models for it, and its simulation.

`design`, `isa`, `disassemble` and `compile` need the base install alone; `rtl`, `simulate`, `board`
and `synthesis` need the extra `hardware`.
"""
