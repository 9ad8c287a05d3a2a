"""What pulls renders toward what a diffusion model knows: one engine, its settings and its parts."""
