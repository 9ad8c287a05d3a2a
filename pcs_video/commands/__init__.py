"""What `pcs video` does on a command line."""
