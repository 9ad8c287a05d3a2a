"""Evaluates a motion, a subject, or both, with prompts, clips with and without them, and scores with intervals."""
