"""What a run publishes, and what can be done with it."""
