"""The encoder's products in low precision, with a bound on each one's error."""
