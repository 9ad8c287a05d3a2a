"""From a field and cameras to pictures."""
