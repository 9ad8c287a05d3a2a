"""Scores that measure whether pictures show the subject, follow the prompt or are copies, and what else learning changed."""
