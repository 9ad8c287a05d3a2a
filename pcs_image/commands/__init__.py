"""The commands of `pcs image`, which are thin wrappers around the runner."""
