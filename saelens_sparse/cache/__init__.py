"""`saelens-sparse cache`: activations that are written once."""
