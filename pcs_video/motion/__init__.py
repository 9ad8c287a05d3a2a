"""Recipe parts for clips, which the core does not have."""
