"""Measures how things move in clips, and what the frames look like."""
