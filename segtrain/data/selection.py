"""Select a subset of a dataset by person area, number of people, crowds, and negatives."""

import numpy as np
import numpy.typing as npt

from segtrain.config.schema import DataConfig
from segtrain.data.sample import DatasetIndex

Indices = npt.NDArray[np.intp]


def select(index: DatasetIndex, config: DataConfig) -> Indices:
    """Find the images that the configuration selects, in their original order.

    The range `person_area` applies to every image, so it excludes images without people unless
    `negatives` sets their share. Which negatives are selected depends only on their identities: a
    larger share adds negatives and never replaces any.

    Returns:
        Ascending row numbers of `index`.
    """
    selected = np.ones(len(index), dtype=bool)
    negative = is_negative(index)
    if config.person_area is not None:
        low, high = config.person_area
        in_range = (index.person_fraction >= low) & (index.person_fraction <= high)
        selected &= in_range if config.negatives is None else in_range | negative
    if config.max_people is not None:
        selected &= index.num_people <= config.max_people
    if config.crowd == "drop":
        selected &= ~index.has_crowd
    if config.negatives is not None:
        num_positives = int((selected & ~negative).sum())
        max_negatives = round(num_positives * config.negatives / (1 - config.negatives))
        negatives = np.flatnonzero(selected & negative)
        by_identity = negatives[np.argsort(index.identities[negatives], kind="stable")]
        selected[by_identity[max_negatives:]] = False
    return np.flatnonzero(selected)


def is_negative(index: DatasetIndex) -> npt.NDArray[np.bool_]:
    """Mark the images without people and crowds, N bool."""
    return np.asarray((index.num_people == 0) & ~index.has_crowd)
