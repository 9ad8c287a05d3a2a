"""The model families that make clips."""
