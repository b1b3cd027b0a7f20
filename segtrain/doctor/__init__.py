"""A minute of preflight before hours of training: what would make it fail, and the repair.

Nothing here imports OpenCV, or what needs it, before `opencv.py` has said that it works.
"""
