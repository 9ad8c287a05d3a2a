"""Model families that make clips."""
