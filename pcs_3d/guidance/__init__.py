"""Guidance, which computes the gradients that make renders more likely under a diffusion model. All guidance methods
are configurations of one engine."""
