"""Recipe parts that only clips need."""
