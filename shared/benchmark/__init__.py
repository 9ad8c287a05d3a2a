"""Compares recipes over many subjects, with one report for each cell and one table for all of them."""
