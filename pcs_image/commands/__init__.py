"""Command lines of `pcs_image`: thin wrappers around the runner."""
