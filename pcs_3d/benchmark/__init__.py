"""Compares asset recipes on the toybox's held-out subjects."""
