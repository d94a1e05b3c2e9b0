"""Benchmarks of `topk_sparse` against SAELens's own `topk`."""
