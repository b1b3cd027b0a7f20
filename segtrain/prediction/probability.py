"""The probability of person at every pixel of a picture, made where somebody looks at it.

A network sees a small copy of a photo; at the photo's size its answer would take more memory than
the photo. Most of it nobody needs: where the small answer is sure all around, so is every pixel.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from segtrain.prediction.regions import Region, tiles

Values = npt.NDArray[np.float32]
"""H W float32 in 0..1."""


class Enlarged:
    """The mean of a network's answers about one picture, scaled to the picture's size.

    Scaled linearly, pixel centres to pixel centres, as `torch.nn.functional.interpolate` does with
    "bilinear"; to float32's precision, which OpenCV's own warping of regions does not have.

    Args:
        answers: h w float32 in 0..1 each, of whatever sizes the network saw the picture at.
        size: H, W of the picture.
    """

    def __init__(self, answers: Sequence[Values], size: tuple[int, int]) -> None:
        self.shape = size
        self._answers = answers

    def __getitem__(self, region: Region) -> Values:
        """These rows and columns, h w float32."""
        first, *others = (self._enlarged(wide, region) for wide in self._wide)
        for other in others:
            first = first + other
        return first / np.float32(1 + len(others)) if others else first

    def __array__(
        self, dtype: npt.DTypeLike | None = None, copy: bool | None = None
    ) -> npt.NDArray[Any]:
        """All of it, H W float32, where numpy is asked for an array."""
        everything = np.empty(self.shape, dtype=np.float32)
        for tile in tiles(self.shape, reach=0):
            everything[tile.inner] = self[tile.inner]
        return everything.astype(dtype or np.float32, copy=False)

    def bounds(self, region: Region) -> tuple[float, float]:
        """No pixel of these rows and columns is below the first or above the second number."""
        lows, highs = [], []
        for wide in self._wide:
            above, below, _ = self._rows(wide, region[0])
            seen = wide[above[0] : below[-1] + 1, region[1]]
            lows.append(float(seen.min()))
            highs.append(float(seen.max()))
        return float(np.mean(lows)), float(np.mean(highs))

    @cached_property
    def _wide(self) -> list[Values]:
        """The answers at the picture's width; their height is scaled where it is looked at."""
        return [_widened(answer, self.shape[1]) for answer in self._answers]

    def _enlarged(self, wide: Values, region: Region) -> Values:
        if len(wide) == self.shape[0]:
            return wide[region]
        above, below, share = self._rows(wide, region[0])
        seen = wide[:, region[1]]
        upper: Values = seen[above]
        lower: Values = seen[below]
        lower -= upper
        lower *= share[:, None]
        upper += lower
        return upper

    def _rows(self, wide: Values, rows: slice) -> tuple[Any, Any, Values]:
        """Of each row of the picture the two between which it lies, and the second one's share."""
        scale = len(wide) / self.shape[0]
        place = ((np.arange(rows.start, rows.stop) + 0.5) * scale - 0.5).clip(0, len(wide) - 1)
        above = place.astype(np.intp)
        below = np.minimum(above + 1, len(wide) - 1)
        return above, below, (place - above).astype(np.float32)


Probability = Values | Enlarged
"""Of person at every pixel: an array, or what behaves like one where tiles are read."""


def bounds(probability: Probability, region: Region) -> tuple[float, float]:
    """No pixel of these rows and columns is below the first or above the second number."""
    if isinstance(probability, Enlarged):
        return probability.bounds(region)
    inside = probability[region]
    return float(inside.min()), float(inside.max())


def _widened(answer: Values, width: int) -> Values:
    if answer.shape[1] == width:
        return answer
    wide = cv2.resize(answer, (width, answer.shape[0]), interpolation=cv2.INTER_LINEAR)
    return np.asarray(wide, dtype=np.float32)
