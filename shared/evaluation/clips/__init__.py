"""Evaluates a motion, a subject, or both, by scoring clips generated with and without them."""
