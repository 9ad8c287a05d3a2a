"""Recipes: their schema, how they are found, and how they are resolved."""
