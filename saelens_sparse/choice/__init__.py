"""What a call runs on, and why."""
