"""The command lines of `pcs 3d`."""
