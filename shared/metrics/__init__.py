"""Scores: is it the subject, does it show what was asked for, is it a copy, and what else did learning change?"""
