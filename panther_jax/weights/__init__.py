"""Weights: those that others published, and where they are."""
