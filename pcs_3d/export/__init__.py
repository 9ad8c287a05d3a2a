"""From a field to files for other programs, each read back and compared."""
