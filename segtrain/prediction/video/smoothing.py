"""Taking the flicker out of a sequence of probabilities, without leaving ghosts behind motion.

A network sees each frame alone, and where it is unsure its answer trembles. Where the picture
stands still, its answer may be averaged over time; where the picture moves, an average is a ghost.
"""

import math

import cv2
import numpy as np
import numpy.typing as npt

from segtrain.images import Pixels
from segtrain.prediction.probability import Values

# The past fades by a factor of e in this time: two or three frames of a usual clip.
TIME_CONSTANT = 0.1
# Change of brightness, of 255, up to which a place stands still (noise, compression), and from
# which on it is another place.
STILL, MOVED = 4.0, 12.0
# Where more of the picture than this has moved, it is another scene.
CUT_SHARE = 0.5
# Change is looked for at this short side: means of blocks, in which noise cancels out.
_SHORT_SIDE = 120

_Grey = npt.NDArray[np.float32]


class Smoother:
    """A running average over time: s = w s_before + (1 - w) p, with w of each pixel

        w = exp(-seconds since the last frame / TIME_CONSTANT) * stillness

    where stillness is 1 below a change of STILL, 0 above MOVED and a line between, of the largest
    change among neighbours. It needs no frame to come and keeps one map and one small picture.
    """

    def __init__(self) -> None:
        self._grey: _Grey | None = None
        self._smooth: Values | None = None
        self._seconds = 0.0

    def smooth(self, pixels: Pixels, probability: Values, seconds: float) -> Values:
        """The next frame's probabilities, averaged with what came before.

        Args:
            pixels: H W 3 uint8 RGB, of the same size each time.
            probability: H W float32 in 0..1.
            seconds: when the frame is shown.

        Returns:
            H W float32 in 0..1.
        """
        grey = _small_grey(pixels)
        weight = self._weight(grey, seconds)
        if weight is not None and self._smooth is not None:
            height, width = probability.shape
            past = cv2.resize(weight, (width, height), interpolation=cv2.INTER_LINEAR)
            probability = np.asarray(
                cv2.blendLinear(self._smooth, probability, past, 1 - past), dtype=np.float32
            )
        self._grey, self._smooth, self._seconds = grey, probability, seconds
        return probability

    def _weight(self, grey: _Grey, seconds: float) -> _Grey | None:
        """What the past weighs, small h w float32 in 0..1; None: nothing, anywhere."""
        if self._grey is None:
            return None
        change = cv2.absdiff(grey, self._grey)
        if (change > MOVED).mean() > CUT_SHARE:
            return None
        # What moves has edges that change and an inside that does not.
        change = cv2.dilate(change, np.ones((3, 3), dtype=np.uint8))
        stillness = ((MOVED - change) / (MOVED - STILL)).clip(0, 1)
        faded = math.exp(-max(0.0, seconds - self._seconds) / TIME_CONSTANT)
        return np.asarray(faded * stillness, dtype=np.float32)


def _small_grey(pixels: Pixels) -> _Grey:
    height, width = pixels.shape[:2]
    scale = min(1.0, _SHORT_SIDE / min(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    return np.asarray(cv2.cvtColor(small, cv2.COLOR_RGB2GRAY), dtype=np.float32)
