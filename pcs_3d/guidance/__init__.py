"""Guidance: pulls renders towards what a diffusion model finds likely. One engine, with its settings and parts."""
