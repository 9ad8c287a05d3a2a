"""Compares recipes across many subjects. Writes one report for each recipe and subject, and one table for all reports."""
