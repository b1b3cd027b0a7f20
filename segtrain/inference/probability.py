"""Full-resolution person probabilities, computed for the regions that are read.

A network sees a photo at a small size. At the size of the photo, its output would take more memory
than the photo. Most of that is never needed: where the small output is certain all around, so is
every pixel.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from segtrain.imaging.blocks import Region, blocks
from segtrain.types import Probs


class UpsampledProbs:
    """The mean of a network's outputs for one image, upsampled to the image's size.

    Upsampling is bilinear with aligned pixel centers, as `torch.nn.functional.interpolate` with
    "bilinear", and exact to float32's precision, unlike OpenCV's own warping of regions.

    Args:
        outputs: h w float32 in 0..1 each, one for each size at which the network saw the image.
        size: H, W of the image.
    """

    def __init__(self, outputs: Sequence[Probs], size: tuple[int, int]) -> None:
        self.shape = size
        self._outputs = outputs

    def __getitem__(self, region: Region) -> Probs:
        """The probabilities of these rows and columns, h w float32."""
        first, *others = (self._upsample_rows(output, region) for output in self._full_width)
        for other in others:
            first = first + other
        return first / np.float32(1 + len(others)) if others else first

    def __array__(
        self, dtype: npt.DTypeLike | None = None, copy: bool | None = None
    ) -> npt.NDArray[Any]:
        """All probabilities, H W float32, as a numpy array."""
        array = np.empty(self.shape, dtype=np.float32)
        for block in blocks(self.shape, reach=0):
            array[block.inner] = self[block.inner]
        return array.astype(dtype or np.float32, copy=False)

    def bounds(self, region: Region) -> tuple[float, float]:
        """A lower and an upper bound of the probabilities in these rows and columns."""
        lows, highs = [], []
        for output in self._full_width:
            above, below, _ = self._source_rows(output, region[0])
            source = output[above[0] : below[-1] + 1, region[1]]
            lows.append(float(source.min()))
            highs.append(float(source.max()))
        return float(np.mean(lows)), float(np.mean(highs))

    @cached_property
    def _full_width(self) -> list[Probs]:
        """The outputs at the image's width; their rows are upsampled only where they are read."""
        return [_resize_width(output, self.shape[1]) for output in self._outputs]

    def _upsample_rows(self, output: Probs, region: Region) -> Probs:
        if len(output) == self.shape[0]:
            return output[region]
        above, below, weight = self._source_rows(output, region[0])
        columns = output[:, region[1]]
        upper: Probs = columns[above]
        lower: Probs = columns[below]
        lower -= upper
        lower *= weight[:, None]
        upper += lower
        return upper

    def _source_rows(self, output: Probs, rows: slice) -> tuple[Any, Any, Probs]:
        """For each image row, the two output rows around it and the weight of the second."""
        scale = len(output) / self.shape[0]
        position = ((np.arange(rows.start, rows.stop) + 0.5) * scale - 0.5).clip(0, len(output) - 1)
        above = position.astype(np.intp)
        below = np.minimum(above + 1, len(output) - 1)
        return above, below, (position - above).astype(np.float32)


ProbsLike = Probs | UpsampledProbs
"""Person probabilities of every pixel, as an array or an object that is read like one."""


def bounds(probability: ProbsLike, region: Region) -> tuple[float, float]:
    """Return a lower and an upper bound of the probabilities in these rows and columns."""
    if isinstance(probability, UpsampledProbs):
        return probability.bounds(region)
    inside = probability[region]
    return float(inside.min()), float(inside.max())


def _resize_width(output: Probs, width: int) -> Probs:
    if output.shape[1] == width:
        return output
    resized = cv2.resize(output, (width, output.shape[0]), interpolation=cv2.INTER_LINEAR)
    return np.asarray(resized, dtype=np.float32)
