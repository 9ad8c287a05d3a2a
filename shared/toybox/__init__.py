"""The toybox: a procedural world small enough to train a real diffusion pipeline on (design section 5)."""
