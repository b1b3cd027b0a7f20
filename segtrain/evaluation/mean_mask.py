"""The answer that looks at no picture: where people were in the training pictures."""

from dataclasses import dataclass
from functools import partial

import cv2
import numpy as np
import numpy.typing as npt

from segtrain.classes import IGNORE, PERSON
from segtrain.data.sample import Sample, Source
from segtrain.data.threads import in_threads
from segtrain.errors import DataError
from segtrain.evaluation.picture import Probs
from segtrain.images import Pixels

GRID = 64
"""Cells to each side; pictures of all shapes are squeezed into them."""


@dataclass(frozen=True)
class MeanMask:
    """An answer for pictures of any size.

    share: 64 64 float32 in 0..1, share of person at each place of the frame.
    threshold: from which share on the answer is person.
    """

    share: Probs
    threshold: float

    def probs(self, size: tuple[int, int]) -> Probs:
        """What it says of a picture of H, W: H W float32 in 0..1."""
        stretched = cv2.resize(self.share, size[::-1], interpolation=cv2.INTER_LINEAR)
        return np.clip(stretched, 0, 1).astype(np.float32).reshape(size)

    def answer(self, size: tuple[int, int]) -> Pixels:
        """What it calls person in a picture of H, W: H W uint8 in {0, 1}."""
        return (self.probs(size) >= np.float32(self.threshold)).view(np.uint8)


def mean_mask(source: Source) -> MeanMask:
    """The mean over pictures squeezed into one square.

    Of a cell's pixels those that are ignored are left out; a cell of which nothing is known has the
    share of all others, and where no picture tells anything it is 0. Damaged pictures are left out.
    The threshold is the one with the highest person IoU over these pictures: where people are small
    the share is nowhere one half, and at one half the answer would be the empty one.

    Args:
        source: the training pictures.
    """
    person, known = np.zeros((2, GRID, GRID))
    read = partial(_sample_or_none, source)
    for _, sample in in_threads(read, range(len(source)), desc="looking at training masks"):
        if sample is not None:
            person += _squeezed(sample.mask == PERSON)
            known += _squeezed(sample.mask != IGNORE)
    everywhere = person.sum() / known.sum() if known.any() else 0.0
    share = np.where(known > 0, person / np.where(known > 0, known, 1), everywhere)
    share = np.clip(share, 0, 1).astype(np.float32)
    return MeanMask(share, _best_threshold(share, person, known))


def _best_threshold(
    share: Probs, person: npt.NDArray[np.float64], known: npt.NDArray[np.float64]
) -> float:
    """Of all shares the one from which on calling cells person gives the highest IoU."""
    order = np.argsort(-share, axis=None, kind="stable")
    found = person.flat[order].cumsum()
    if not found[-1]:
        return 0.5
    ious = found / (known.flat[order].cumsum() + found[-1] - found)
    falling = share.flat[order]
    ious[:-1][falling[:-1] == falling[1:]] = 0  # cells of the same share go together
    return float(falling[np.argmax(ious)])


def _sample_or_none(source: Source, index: int) -> Sample | None:
    try:
        return source.sample(index, short_side=GRID)
    except DataError:
        return None


def _squeezed(some: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    pixels: Pixels = some.view(np.uint8)
    return np.asarray(
        cv2.resize(pixels.astype(np.float64), (GRID, GRID), interpolation=cv2.INTER_AREA)
    )
