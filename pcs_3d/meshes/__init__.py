"""Reads triangles and points from files, and forms shapes from them."""
