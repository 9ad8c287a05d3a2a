"""Reads meshes and points from files and turns them into shapes."""
