"""Clips of the toybox: how things and the camera move, in captioned motions and in motions without a caption."""
