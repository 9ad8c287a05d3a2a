"""Model families that generate clips."""
