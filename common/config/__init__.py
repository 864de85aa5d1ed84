"""Settings of a run, one frozen model a concern."""
