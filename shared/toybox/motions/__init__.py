"""Draws clips of the toybox, in which a thing or the camera moves. Some motions are captioned; others are held out."""
