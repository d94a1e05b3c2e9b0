"""What every operation uses."""
