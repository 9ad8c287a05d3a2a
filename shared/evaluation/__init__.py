"""One concept judged: prompts, pictures with it and without it, scores with their intervals."""
