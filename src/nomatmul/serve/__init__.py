"""An OpenAI-compatible server of packed models: `nomatmul serve`.

One engine thread runs all models (`scheduler`), a tree of states spares what was computed before
(`cache`), and FastAPI's routers turn requests into jobs and their news into events.
"""
