"""The design in simulation: its Verilog, cycle by cycle, beside a memory, a host and the oracle."""

from nomatmul.hardware.simulate.harness import Memory, Stopped
from nomatmul.hardware.simulate.run import Report, Simulation, Waves

__all__ = ["Memory", "Report", "Simulation", "Stopped", "Waves"]
