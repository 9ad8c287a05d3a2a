"""Trains the toybox's backbone and evaluators on data."""
