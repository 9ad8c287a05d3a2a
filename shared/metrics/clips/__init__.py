"""Measures of clips: how things move, and what the frames look like."""
