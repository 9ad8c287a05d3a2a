"""Evaluates one concept, with prompts, pictures with and without the concept, and scores with intervals."""
