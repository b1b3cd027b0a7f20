"""Images with predictions, and their counts, for the tests of evaluation."""

import cv2
import numpy as np

from segtrain.data.sample import DatasetIndex
from segtrain.evaluation.counts import CountAccumulator, Totals, count_image
from segtrain.types import Mask, Probs


def smooth_case(seed: int, shape: tuple[int, int] = (48, 64)) -> tuple[Probs, Mask]:
    """Mostly correct probabilities and a ground truth with all classes and ignored pixels."""
    rng = np.random.default_rng(seed)
    noise, mask_noise, ignore_noise = (
        cv2.GaussianBlur(rng.standard_normal(shape), (0, 0), min(shape) / 8) for _ in range(3)
    )
    scale = noise.std()
    probs = 1 / (1 + np.exp(-3 * (noise / scale + 0.3)))
    mask = (noise + 0.4 * mask_noise > 0.5 * scale).astype(np.uint8)
    mask[ignore_noise > np.quantile(ignore_noise, 0.9)] = 255
    return probs.astype(np.float32), mask


def random_catalog(num: int, seed: int = 0) -> DatasetIndex:
    """The catalog of `num` images, with random entries."""
    rng = np.random.default_rng(seed)
    return DatasetIndex(
        sizes=np.full((num, 2), 10, dtype=np.int32),
        person_fraction=np.zeros(num, dtype=np.float32),
        num_people=rng.integers(0, 6, num).astype(np.int32),
        has_crowd=rng.random(num) < 0.3,
        identities=rng.permutation(num).astype(np.uint64) + np.uint64(2**63),
    )


def new_accumulator(num: int) -> CountAccumulator:
    """An accumulator for `num` images, which come from two data sets, one after the other."""
    return CountAccumulator(random_catalog(num), np.arange(num) * 2 // max(num, 1))


def smooth_totals(num: int, indices: list[int] | None = None) -> Totals:
    """The totals of `num` smooth cases, or of those with these indices, in this order."""
    accumulator = new_accumulator(num)
    for index in range(num) if indices is None else indices:
        accumulator.add(index, count_image(*smooth_case(index)))
    return accumulator.totals()
