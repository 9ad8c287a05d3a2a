"""The core's command lines: thin wrappers around Python functions."""
