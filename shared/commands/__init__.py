"""The core's commands, which are thin wrappers around Python functions."""
