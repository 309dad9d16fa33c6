"""The numpy oracle: every operation of docs/numerics.md, slow and exact."""
