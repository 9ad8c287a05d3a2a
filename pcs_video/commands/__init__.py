"""The command lines of `pcs video`."""
