"""Recipe parts for clips that the core does not have."""
