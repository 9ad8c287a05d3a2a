"""Trains networks from data: the toybox's backbone and its evaluators."""
