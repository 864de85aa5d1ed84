"""A hospital's machine: approval of the app, its guard, its peers."""
