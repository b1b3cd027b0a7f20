"""Prediction for images and videos: masks, cutouts and new backgrounds."""
