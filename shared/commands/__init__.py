"""Command lines of the core: thin doors to Python functions."""
