"""Training and measuring the toybox's evaluators."""
