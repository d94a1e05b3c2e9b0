"""The command `saelens-sparse compare`."""
