"""Guidance, which changes renders so that a diffusion model finds them more likely. All methods are settings of one
engine."""
