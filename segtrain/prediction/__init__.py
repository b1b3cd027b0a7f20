"""Using a network: pictures in, masks and cut-outs out."""
