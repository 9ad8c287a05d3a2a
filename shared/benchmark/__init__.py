"""Compares many concepts: one report per cell, then a table."""
