"""Rivals that publish a generator."""
