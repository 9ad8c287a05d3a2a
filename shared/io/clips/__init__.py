"""Reads clips (videos, animations, folders of frames) as streams, and writes them atomically."""
