"""Sparse operations on latents. Nothing here knows SAELens.

Each operation validates its arguments and picks the PyTorch or the Triton implementation; the two
never import each other.
"""
