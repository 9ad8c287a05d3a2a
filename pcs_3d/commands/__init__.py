"""What `pcs 3d` does on a command line."""
