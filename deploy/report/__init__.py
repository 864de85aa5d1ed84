"""Pages about a run: one for the coordinator, and one for each site, made there."""
