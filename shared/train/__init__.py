"""One loop for tuning and distillation, and what it needs to log, save and resume."""
