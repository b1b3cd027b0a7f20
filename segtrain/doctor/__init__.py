"""Preflight checks of the machine and the data, each with a fix.

No module imports OpenCV, or a module that needs it, before `opencv.py` has checked that it works.
"""
