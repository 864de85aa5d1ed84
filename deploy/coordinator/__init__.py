"""The coordinator's machine: its folder, its registry of sites, its runs."""
