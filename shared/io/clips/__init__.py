"""Clips in and out: videos, animations and folders of frames, read as streams, written whole."""
