"""What computes: one module a backend, imported by `nomatmul.engine.backend` when asked for."""
