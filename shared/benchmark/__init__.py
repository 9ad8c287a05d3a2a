"""Many concepts compared: one report per cell, then a table."""
