"""Trains and measures the toybox's evaluators."""
