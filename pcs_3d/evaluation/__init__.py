"""Measures finished assets, using their renders and, if it is known, the real object."""
