"""The comparison: data and protocol, reference rows, tables and curves. Run from a clone of the project."""
