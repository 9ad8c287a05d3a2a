"""Learns subjects and motions from pictures and clips, and shows them in new clips."""
