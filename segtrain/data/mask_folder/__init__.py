"""Datasets as folders of images and masks."""
