"""Triangles and points: reading them from files, and the shapes they form."""
