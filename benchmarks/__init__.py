"""Timings side by side with named peers: python -m benchmarks.NAME [--quick] [--record]."""
