"""Training: the training step, the loop over epochs and stages, and the files of a run."""
