"""A motion, a subject, or both judged in clips: prompts, clips with them and without, scores with their intervals."""
