"""Scores: is it the subject, does it follow the prompt, is it a copy, and what else did learning change?"""
