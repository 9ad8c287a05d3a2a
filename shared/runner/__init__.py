"""What every runner does: plan a run, open a backbone with its concepts, learn, judge."""
