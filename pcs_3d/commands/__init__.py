"""The commands of `pcs 3d`."""
