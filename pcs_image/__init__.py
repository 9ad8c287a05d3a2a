"""Personalized pictures: learn a thing from a few photos, show it in new scenes, measure how well."""
