"""Defines the recipe schema, and finds and resolves recipes."""
