"""Parts that a recipe of clips has besides those of the core."""
