"""How good a set or a head is."""
