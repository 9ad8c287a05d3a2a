"""One loop for tuning and distillation; what it needs to log, save and resume."""
