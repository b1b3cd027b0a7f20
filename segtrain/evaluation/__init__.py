"""Judging a network: counting, the loop, and `segtrain eval`."""
