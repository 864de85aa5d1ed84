"""The generator: Eqs. 1-6 and 11-13 of the paper."""
