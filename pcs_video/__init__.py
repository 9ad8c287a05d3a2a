"""Personalized clips: learn subjects and motions from pictures and clips, show them in new clips."""
