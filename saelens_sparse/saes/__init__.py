"""Sparse counterparts of SAELens's training SAEs."""
