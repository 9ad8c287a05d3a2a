"""Trains the toybox's weights: first the autoencoder, then text model and U-Net on its cached latents.

Each of these is trained in a loop of numbered steps whose randomness depends only on ``(seed, step)``, so an interrupted
run on a CPU resumes with bit-identical results.
"""
