"""`saelens-sparse bench`: registered cases, each arm checked before it is timed."""
