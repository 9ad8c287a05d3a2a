"""The toybox, a procedural world that is small enough to train a real diffusion pipeline on."""
