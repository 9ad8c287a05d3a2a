"""Parts for recipes of clips that the core does not have."""
