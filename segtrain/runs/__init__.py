"""Run folders: create, find, read, list and compare them. Does not import torch."""
