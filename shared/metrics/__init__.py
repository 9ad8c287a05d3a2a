"""Scores: is it the subject, does it show what was asked, is it a copy, and what else did learning it change?"""
