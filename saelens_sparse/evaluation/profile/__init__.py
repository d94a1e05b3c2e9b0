"""`saelens-sparse profile`: one training step of each arm, taken apart."""
