"""Makes 3D assets of subjects learned from pictures, using score distillation."""
