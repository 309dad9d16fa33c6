"""What torch needs: one sub-package an operation, naive.py beside any faster form."""

import nomatmul.ops._needs  # noqa: F401  # before anything that imports torch
