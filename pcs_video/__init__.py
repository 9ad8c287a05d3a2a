"""Clips: subject and motion, learned from pictures and clips, in new clips."""
