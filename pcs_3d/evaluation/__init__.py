"""Measures finished assets: against the real object, if it is known, and by their renders."""
