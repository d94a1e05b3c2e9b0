"""Activation functions, at pairs and between dense products."""
