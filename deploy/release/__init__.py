"""A published bundle: made behind a gate, signed, and checked again on any other machine."""
