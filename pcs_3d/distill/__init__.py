"""Score distillation as a task on the core's loop."""
