"""Searches for the pairs that matter."""
