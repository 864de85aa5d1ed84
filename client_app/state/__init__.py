"""What a site keeps of a run between two messages."""
