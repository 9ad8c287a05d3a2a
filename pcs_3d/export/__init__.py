"""From a field to files that other programs open, each read back and compared."""
