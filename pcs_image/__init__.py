"""Personalized pictures: learn a subject from a few photos, show it in new scenes, measure how well."""
