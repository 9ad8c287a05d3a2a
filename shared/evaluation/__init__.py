"""Evaluates one concept: prompts, pictures with and without it, scores with their intervals."""
