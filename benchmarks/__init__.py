"""Benchmarks of a checkout."""
