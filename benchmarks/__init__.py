"""Measurements, run with ``pytest benchmarks --benchmark-only``; see docs/benchmarks.md."""
