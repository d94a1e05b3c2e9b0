"""Comparing, profiling and benchmarking the sparse architectures: what the commands share."""
