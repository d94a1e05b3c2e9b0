"""Products between rows of a weight and a sparse batch of latents."""
