"""Recipes of assets compared on the toybox's held-out things."""
