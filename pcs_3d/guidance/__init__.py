"""Guidance: pulls renders towards what a diffusion model knows. One engine, its settings and its parts."""
