"""Writes a field to files for other programs; each file is read back and compared."""
