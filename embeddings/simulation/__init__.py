"""Sites made from one public pool."""
