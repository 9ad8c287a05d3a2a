"""Evaluates one concept by scoring pictures generated with and without it."""
