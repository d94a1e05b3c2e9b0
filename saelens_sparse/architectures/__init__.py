"""Sparse counterparts of SAELens's training SAEs, one file each."""
