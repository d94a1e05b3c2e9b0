"""Benchmarks of the sparse architectures against SAELens's own."""
