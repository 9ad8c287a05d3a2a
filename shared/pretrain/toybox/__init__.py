"""Trains the toybox's weights: first the autoencoder, then text model and U-Net on its cached latents.

Each of these is trained in a loop of numbered steps whose randomness depends only on ``(seed, step)``, so that on a CPU an
interrupted run resumes to the same bits.
"""
