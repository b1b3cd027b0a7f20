"""Evaluation: counts, metrics, and `segtrain eval`."""
