"""Compares recipes for assets on the toybox's held-out subjects."""
