"""Trains the toybox's backbone and evaluators from data."""
