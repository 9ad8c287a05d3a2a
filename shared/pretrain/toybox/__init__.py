"""Trains the toybox's weights. The autoencoder is trained first; the text model and the U-Net follow, on its cached
latents.

Each training runs in numbered steps whose randomness depends only on ``(seed, step)``, so an interrupted run on a CPU
resumes with bit-identical results.
"""
