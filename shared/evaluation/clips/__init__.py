"""Evaluates a motion, a subject, or both in clips: prompts, clips with and without them, scores with their intervals."""
