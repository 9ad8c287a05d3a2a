"""Trains the toybox's weights. The autoencoder is trained first, then the text model and the U-Net on its cached
latents.

Each training run consists of numbered steps whose randomness depends only on ``(seed, step)``, so an interrupted run on
a CPU resumes with bit-identical results.
"""
