"""The training loop for tuning and distillation, and the code that logs, saves and resumes runs."""
