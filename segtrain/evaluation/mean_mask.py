"""The answer that looks at no picture: where people were in the training pictures."""

from collections.abc import Sequence

import cv2
import numpy as np
import numpy.typing as npt

from segtrain.classes import IGNORE, PERSON
from segtrain.data.sample import Sample, Source
from segtrain.errors import DataError
from segtrain.evaluation.picture import Probs
from segtrain.images import Pixels

GRID = 64
"""Cells to each side; pictures of all shapes are squeezed into them."""


def mean_mask(source: Source, indices: Sequence[int] | None = None) -> Probs:
    """Share of person at each place of the frame, over pictures squeezed into one square.

    Of a cell's pixels those that are ignored are left out; a cell of which nothing is known has the
    share of all others. Damaged pictures are left out.

    Args:
        indices: the pictures; None takes all.

    Returns:
        64 64 float32 in 0..1; 0 where no picture tells anything.
    """
    person, known = np.zeros((2, GRID, GRID))
    for index in range(len(source)) if indices is None else indices:
        sample = _sample_or_none(source, index)
        if sample is not None:
            person += _squeezed(sample.mask == PERSON)
            known += _squeezed(sample.mask != IGNORE)
    everywhere = person.sum() / known.sum() if known.any() else 0.0
    share = np.where(known > 0, person / np.where(known > 0, known, 1), everywhere)
    return np.clip(share, 0, 1).astype(np.float32)


def mean_mask_probs(mean: Probs, size: tuple[int, int]) -> Probs:
    """What the mean mask says of a picture.

    Args:
        mean: as `mean_mask` returns it.
        size: H, W of the picture.

    Returns:
        H W float32 in 0..1.
    """
    stretched = cv2.resize(mean, size[::-1], interpolation=cv2.INTER_LINEAR)
    return np.clip(stretched, 0, 1).astype(np.float32).reshape(size)


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
