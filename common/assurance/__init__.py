"""What a run promises, and how the promise is tried: plans, audits, statements."""
