"""Frozen encoders of images."""
