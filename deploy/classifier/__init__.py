"""Heads trained on a published set, as files."""
