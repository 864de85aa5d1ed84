"""Methods that publish a linear head."""
