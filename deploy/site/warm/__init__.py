"""Warm starts of a site's messages."""
