"""Reads meshes and points from files, and makes shapes of them."""
