"""Benchmarks: `python -m tools.bench OP`. Each prints a table, or one JSON document with --json."""
