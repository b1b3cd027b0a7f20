"""Person probabilities of an image, for validation, evaluation, prediction and export."""
