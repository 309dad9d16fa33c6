"""The accelerator's units in Amaranth (extra `hardware`)."""

from nomatmul._extras import require_hardware

require_hardware("The accelerator's design", ("amaranth",))
