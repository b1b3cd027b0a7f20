"""Pictures with a prediction, and their counts, for several test files."""

import cv2
import numpy as np

from segtrain.data.sample import Catalog
from segtrain.evaluation.picture import Probs, count_picture
from segtrain.evaluation.totals import Tally, Totals
from segtrain.images import Pixels


def smooth_case(seed: int, shape: tuple[int, int] = (48, 64)) -> tuple[Probs, Pixels]:
    """Probabilities that are mostly right, truth, and something ignored; every class is there."""
    rng = np.random.default_rng(seed)
    noise, more, other = (
        cv2.GaussianBlur(rng.standard_normal(shape), (0, 0), min(shape) / 8) for _ in range(3)
    )
    scale = noise.std()
    probs = 1 / (1 + np.exp(-3 * (noise / scale + 0.3)))
    mask = (noise + 0.4 * more > 0.5 * scale).astype(np.uint8)
    mask[other > np.quantile(other, 0.9)] = 255
    return probs.astype(np.float32), mask


def catalog_of(num: int, seed: int = 0) -> Catalog:
    """What might be known of `num` pictures."""
    rng = np.random.default_rng(seed)
    return Catalog(
        sizes=np.full((num, 2), 10, dtype=np.int32),
        person_share=np.zeros(num, dtype=np.float32),
        num_people=rng.integers(0, 6, num).astype(np.int32),
        has_crowd=rng.random(num) < 0.3,
        identities=rng.permutation(num).astype(np.uint64) + np.uint64(2**63),
    )


def tally_of(num: int) -> Tally:
    """For pictures of two data sets, one after the other."""
    return Tally(catalog_of(num), np.arange(num) * 2 // num)


def totals_of(num: int, chosen: list[int] | None = None) -> Totals:
    """Of the smooth cases with these numbers, in this order."""
    tally = tally_of(num)
    for index in range(num) if chosen is None else chosen:
        tally.add(index, count_picture(*smooth_case(index)))
    return tally.totals()
