"""The code that all runners share: planning a run, opening a backbone with its concepts, learning and judging."""
