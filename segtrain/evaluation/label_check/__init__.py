"""`--label-check`: images whose annotation contradicts a confident model, for review."""
