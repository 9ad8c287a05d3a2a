"""How the toybox's weights are made: first the autoencoder, then, on its cached latents, text model and U-Net.

Every training is a loop of numbered steps whose randomness depends on ``(seed, step)`` alone, so a stopped run resumes
to the same bits on a CPU.
"""
