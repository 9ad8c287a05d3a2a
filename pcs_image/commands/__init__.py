"""Command lines of `pcs_image`: thin doors to the runner."""
