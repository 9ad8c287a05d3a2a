"""Draws toybox clips, in which a thing or the camera moves. Some motions are captioned, and others are held out."""
