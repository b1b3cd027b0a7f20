"""The training pictures' mean mask against means by hand."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from evaluation_cases import catalog_of

from segtrain.data.sample import Catalog, Sample
from segtrain.errors import DataError
from segtrain.evaluation.mean_mask import GRID, MeanMask, mean_mask
from segtrain.evaluation.picture import count_picture
from segtrain.images import Pixels


class Masks:
    """A data set of masks; None is a damaged picture."""

    def __init__(self, *masks: Pixels | None) -> None:
        self.masks = masks
        self.catalog: Catalog = catalog_of(len(masks))
        self.skipped: Counter[str] = Counter()
        self.notes: list[str] = []

    def __len__(self) -> int:
        return len(self.masks)

    def sample(self, index: int, short_side: int | None = None) -> Sample:
        mask = self.masks[index]
        if mask is None:
            raise DataError("damaged")
        image = np.zeros((*mask.shape, 3), dtype=np.uint8)
        return Sample(image=image, mask=mask, image_id=str(index))

    def picture_path(self, index: int) -> Path:
        return Path(str(index))

    def stem(self, index: int) -> str:
        return str(index)


def full(value: int, shape: tuple[int, int] = (GRID, GRID)) -> Pixels:
    return np.full(shape, value, dtype=np.uint8)


def test_the_mean_is_that_of_each_cell() -> None:
    rng = np.random.default_rng(0)
    masks = [rng.choice([0, 1], (GRID, GRID)).astype(np.uint8) for _ in range(5)]
    np.testing.assert_allclose(mean_mask(Masks(*masks)).share, np.mean(masks, axis=0), atol=1e-6)


def test_pictures_of_other_shapes_are_squeezed() -> None:
    """A wide one whose left quarter is person, a high one whose upper quarter is."""
    wide, high = full(0, (GRID, 4 * GRID)), full(0, (3 * GRID, GRID))
    wide[:, :GRID] = 1
    high[: 3 * GRID // 4] = 1
    mean = mean_mask(Masks(wide, high)).share
    quarter = GRID // 4
    assert (mean[:quarter, :quarter] == 1).all()
    assert (mean[:quarter, quarter:] == 0.5).all()
    assert (mean[quarter:, :quarter] == 0.5).all()
    assert (mean[quarter:, quarter:] == 0).all()


def test_ignored_pixels_are_left_out_of_numerator_and_denominator() -> None:
    some = full(1)
    some[:, 10:] = 255
    mean = mean_mask(Masks(some, full(0), full(1))).share
    assert mean[0, 0] == pytest.approx(2 / 3)
    assert mean[0, 20] == pytest.approx(1 / 2)


def test_a_cell_that_is_always_ignored_has_the_share_of_the_others() -> None:
    some = full(0)
    some[:16] = 1
    some[:, :32] = 255
    mean = mean_mask(Masks(some)).share
    assert mean[0, 0] == pytest.approx(16 / 64)
    assert mean[0, 40] == 1


def test_damaged_pictures_are_left_out() -> None:
    source = Masks(full(1), None, full(0), full(0))
    assert mean_mask(source).share[0, 0] == pytest.approx(1 / 3)


@pytest.mark.parametrize("source", [Masks(), Masks(None), Masks(full(255))])
def test_where_nothing_is_known_nobody_is_seen(source: Masks) -> None:
    mean = mean_mask(source)
    assert (mean.probs((3, 4)) == 0).all()
    assert mean.threshold > 0


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (480, 640), (64, 64), (30, 7)], ids=str)
def test_it_answers_for_pictures_of_any_size(size: tuple[int, int]) -> None:
    mean = np.linspace(0, 1, GRID, dtype=np.float32)[None].repeat(GRID, axis=0)
    probs = MeanMask(mean, 0.5).probs(size)
    assert probs.shape == size
    assert probs.dtype == np.float32
    # Brighter to the right, the same in all rows, and one half in the middle.
    assert (np.diff(probs, axis=1) >= 0).all()
    np.testing.assert_allclose(probs, probs[:1].repeat(size[0], axis=0), atol=1e-6)
    assert probs.mean() == pytest.approx(0.5, abs=0.02)


def test_the_threshold_is_the_one_with_the_highest_iou_over_the_pictures() -> None:
    """Small people, each somewhere near the middle: nowhere is half of the pictures person."""
    rng = np.random.default_rng(1)
    masks = []
    for top, left in rng.integers(16, 40, (12, 2)):
        mask = full(0)
        mask[top : top + 12, left : left + 12] = 1
        mask[:, :3] = 255
        masks.append(mask)
    mean = mean_mask(Masks(*masks))
    probs = mean.probs((GRID, GRID))
    assert probs.max() < 0.9

    def iou(threshold: float) -> float:
        confusion = sum(count_picture(probs, m, threshold=threshold).confusion for m in masks)
        counts = np.asarray(confusion)
        return float(counts[1, 1] / (counts.sum() - counts[0, 0]))

    assert iou(mean.threshold) == max(map(iou, np.unique(probs).tolist()))
    assert iou(mean.threshold) > iou(0.5)
