"""Scores for whether pictures show the subject, follow the prompt or are copies, and for what else learning changed."""
