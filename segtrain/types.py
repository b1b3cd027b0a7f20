"""Class values of masks, and array types."""

import numpy as np
import numpy.typing as npt

BACKGROUND, PERSON = 0, 1
# Crowds and regions that annotators left open. Every loss and metric ignores these pixels.
IGNORE = 255
CLASSES = ("background", "person")

Image = npt.NDArray[np.uint8]
"""H W 3 in RGB, or H W 4 with an alpha channel; N H W 3 for a batch."""
Mask = npt.NDArray[np.uint8]
"""H W: classes in {0, 1, 255}, or gray levels such as alpha."""
Probs = npt.NDArray[np.float32]
"""H W: probability of person, 0 to 1."""
BoolMask = npt.NDArray[np.bool_]
"""H W: a region of an image."""
