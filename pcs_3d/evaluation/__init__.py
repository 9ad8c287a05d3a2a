"""Finished assets measured: against the true thing where it is known, and by what their renders show."""
