"""Trains the toybox's backbone and its evaluators from data."""
