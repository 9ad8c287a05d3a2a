"""The commands of `pcs video`."""
