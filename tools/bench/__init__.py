"""Benchmarks: `python -m tools.bench OP`. Each prints a table, and last one line of JSON."""
