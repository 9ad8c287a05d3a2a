"""The commands of the core package. Each is a thin wrapper around a Python function."""
