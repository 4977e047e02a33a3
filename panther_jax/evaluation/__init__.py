"""Metrics, scores of cases and folds, statistics, comparison, components."""
