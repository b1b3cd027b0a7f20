"""Training a network: one epoch, the loop over them, and what a run leaves."""
