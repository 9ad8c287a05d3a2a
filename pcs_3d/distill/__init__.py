"""Score distillation, as a task for the training loop in `shared`."""
