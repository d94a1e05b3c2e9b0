"""The encoder's products in low precision, with a proven bound on each one's error."""
