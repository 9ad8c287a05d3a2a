"""Measures whether pictures show the subject, follow the prompt or copy a reference.

It also measures how much a loaded concept changes pictures of other things.
"""
