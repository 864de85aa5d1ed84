"""What a site allows, and what a server asks of it."""
