"""The command `saelens-sparse profile`."""
