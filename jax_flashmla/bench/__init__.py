"""Benchmarks: `python -m jax_flashmla.bench OP`. docs/benchmark.md says what is timed and how.

protocol.py has the one way of timing; cases.py the shapes; peers.py the other kernels; report.py table, JSON and plot;
every other file is one op, with what `protocol.Op` lists.
"""
