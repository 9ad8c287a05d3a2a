"""3D assets of things that were learned from pictures, by score distillation."""
