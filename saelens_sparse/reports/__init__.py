"""What the reports of `compare` and `profile` share."""
