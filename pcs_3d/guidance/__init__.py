"""Guidance: pulls renders towards what a diffusion model knows. One engine, with its settings and parts."""
