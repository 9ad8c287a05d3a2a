"""Defines the schema of recipes, and finds and resolves recipes."""
