"""Triangles and points: reading them from files, and what is known about a shape made of them."""
