"""Writes a field to files for other programs. Each file is read back and compared with what was written."""
