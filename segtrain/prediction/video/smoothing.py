"""Temporal smoothing of probabilities, without ghosts behind moving objects.

The network sees each frame alone, and its predictions flicker where it is uncertain. Where the
image does not move, predictions can be averaged over time; where it moves, an average is a ghost.
"""

import math

import cv2
import numpy as np
import numpy.typing as npt

from segtrain.types import Image, Probs

# Seconds in which past probabilities decay by a factor of e: two or three frames of a typical clip.
TIME_CONSTANT = 0.1
# Change of brightness, of 255, up to which a pixel is still (noise, compression), and from which it
# has moved.
STILL, MOVED = 4.0, 12.0
# If more than this fraction of the image has moved, it is a cut.
CUT_FRACTION = 0.5
# Changes are measured at this short side: the means of blocks cancel noise.
_SHORT_SIDE = 120


class TemporalSmoother:
    """A running average over time: s = w s_before + (1 - w) p, with w per pixel

        w = exp(-seconds since the last frame / TIME_CONSTANT) * stillness

    where stillness is 1 below a change of STILL, 0 above MOVED and linear in between, for the
    largest change in the neighborhood. It needs no future frame and stores one probability map and
    one small image.
    """

    def __init__(self) -> None:
        self._gray: npt.NDArray[np.float32] | None = None
        self._smooth: Probs | None = None
        self._seconds = 0.0

    def smooth(self, pixels: Image, probs: Probs, seconds: float) -> Probs:
        """Average the probabilities of the next frame with those of the previous ones.

        Args:
            pixels: H W 3 uint8 RGB, of constant size.
            probs: H W float32 in 0..1.
            seconds: timestamp of the frame.

        Returns:
            H W float32 in 0..1.
        """
        gray = _small_gray(pixels)
        small_weight = self._past_weight(gray, seconds)
        if small_weight is not None and self._smooth is not None:
            height, width = probs.shape
            weight = cv2.resize(small_weight, (width, height), interpolation=cv2.INTER_LINEAR)
            probs = np.asarray(
                cv2.blendLinear(self._smooth, probs, weight, 1 - weight), dtype=np.float32
            )
        self._gray, self._smooth, self._seconds = gray, probs, seconds
        return probs

    def _past_weight(
        self, gray: npt.NDArray[np.float32], seconds: float
    ) -> npt.NDArray[np.float32] | None:
        """Return the weight of the past, small h w float32 in 0..1; None for the first or a cut."""
        if self._gray is None:
            return None
        change = cv2.absdiff(gray, self._gray)
        if (change > MOVED).mean() > CUT_FRACTION:
            return None
        # Only the edges of a uniform moving object change, so take the largest change nearby.
        change = cv2.dilate(change, np.ones((3, 3), dtype=np.uint8))
        stillness = ((MOVED - change) / (MOVED - STILL)).clip(0, 1)
        decay = math.exp(-max(0.0, seconds - self._seconds) / TIME_CONSTANT)
        return np.asarray(decay * stillness, dtype=np.float32)


def _small_gray(pixels: Image) -> npt.NDArray[np.float32]:
    height, width = pixels.shape[:2]
    scale = min(1.0, _SHORT_SIDE / min(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    return np.asarray(cv2.cvtColor(small, cv2.COLOR_RGB2GRAY), dtype=np.float32)
