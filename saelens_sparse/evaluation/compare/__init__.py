"""`saelens-sparse compare`: two architectures trained side by side from one runner config."""
