"""Measure: a file for each suite, and the tools that they share."""
