"""Measures finished assets: against the true thing if it is known, and by their renders."""
