"""Learns a subject from a few photos, shows it in new scenes, and measures the result."""
