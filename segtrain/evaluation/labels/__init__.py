"""`--label-check`: the pictures whose annotation the network surely disagrees with, for review."""
