"""3D assets of subjects learned from pictures, by score distillation."""
