"""What torch needs: one sub-package an operation, naive.py beside any faster form."""
