"""What encoding a batch leaves for the rest of a step."""
