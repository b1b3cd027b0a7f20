"""The mean-mask baseline against worked examples."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from helpers.evaluation import random_catalog

from segtrain.data.sample import DatasetIndex, Sample
from segtrain.errors import DataError
from segtrain.evaluation.baselines import GRID, MeanMask, compute_mean_mask
from segtrain.evaluation.counts import count_image
from segtrain.types import Mask


class MaskDataset:
    """A data set of masks; None is a damaged image."""

    def __init__(self, *masks: Mask | None) -> None:
        self.masks = masks
        self.index: DatasetIndex = random_catalog(len(masks))
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

    def image_path(self, index: int) -> Path:
        return Path(str(index))

    def name(self, index: int) -> str:
        return str(index)


def full(value: int, shape: tuple[int, int] = (GRID, GRID)) -> Mask:
    return np.full(shape, value, dtype=np.uint8)


def test_each_cell_is_a_mean_over_masks() -> None:
    rng = np.random.default_rng(0)
    masks = [rng.choice([0, 1], (GRID, GRID)).astype(np.uint8) for _ in range(5)]
    np.testing.assert_allclose(
        compute_mean_mask(MaskDataset(*masks)).mean, np.mean(masks, axis=0), atol=1e-6
    )


def test_masks_of_other_shapes_are_resized_to_the_grid() -> None:
    """A wide mask whose left quarter is person, and a tall one whose upper quarter is."""
    wide, tall = full(0, (GRID, 4 * GRID)), full(0, (3 * GRID, GRID))
    wide[:, :GRID] = 1
    tall[: 3 * GRID // 4] = 1
    mean = compute_mean_mask(MaskDataset(wide, tall)).mean
    quarter = GRID // 4
    assert (mean[:quarter, :quarter] == 1).all()
    assert (mean[:quarter, quarter:] == 0.5).all()
    assert (mean[quarter:, :quarter] == 0.5).all()
    assert (mean[quarter:, quarter:] == 0).all()


def test_ignored_pixels_are_left_out_of_the_mean() -> None:
    mask = full(1)
    mask[:, 10:] = 255
    mean = compute_mean_mask(MaskDataset(mask, full(0), full(1))).mean
    assert mean[0, 0] == pytest.approx(2 / 3)
    assert mean[0, 20] == pytest.approx(1 / 2)


def test_a_cell_that_is_always_ignored_has_the_mean_of_the_others() -> None:
    mask = full(0)
    mask[:16] = 1
    mask[:, :32] = 255
    mean = compute_mean_mask(MaskDataset(mask)).mean
    assert mean[0, 0] == pytest.approx(16 / 64)
    assert mean[0, 40] == 1


def test_damaged_images_are_left_out() -> None:
    dataset = MaskDataset(full(1), None, full(0), full(0))
    assert compute_mean_mask(dataset).mean[0, 0] == pytest.approx(1 / 3)


@pytest.mark.parametrize("dataset", [MaskDataset(), MaskDataset(None), MaskDataset(full(255))])
def test_without_known_pixels_the_prediction_is_background(dataset: MaskDataset) -> None:
    mean = compute_mean_mask(dataset)
    assert (mean.probs((3, 4)) == 0).all()
    assert mean.threshold > 0


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (480, 640), (64, 64), (30, 7)], ids=str)
def test_probs_have_any_size(size: tuple[int, int]) -> None:
    mean = np.linspace(0, 1, GRID, dtype=np.float32)[None].repeat(GRID, axis=0)
    probs = MeanMask(mean, 0.5).probs(size)
    assert probs.shape == size
    assert probs.dtype == np.float32
    # Ascending to the right, equal in all rows, 0.5 on average.
    assert (np.diff(probs, axis=1) >= 0).all()
    np.testing.assert_allclose(probs, probs[:1].repeat(size[0], axis=0), atol=1e-6)
    assert probs.mean() == pytest.approx(0.5, abs=0.02)


def test_the_threshold_is_the_one_with_the_highest_iou_over_the_images() -> None:
    """Small people near the center: no pixel is person in half of the images."""
    rng = np.random.default_rng(1)
    masks = []
    for top, left in rng.integers(16, 40, (12, 2)):
        mask = full(0)
        mask[top : top + 12, left : left + 12] = 1
        mask[:, :3] = 255
        masks.append(mask)
    mean = compute_mean_mask(MaskDataset(*masks))
    probs = mean.probs((GRID, GRID))
    assert probs.max() < 0.9

    def iou(threshold: float) -> float:
        confusion = sum(count_image(probs, m, threshold=threshold).confusion for m in masks)
        counts = np.asarray(confusion)
        return float(counts[1, 1] / (counts.sum() - counts[0, 0]))

    assert iou(mean.threshold) == max(map(iou, np.unique(probs).tolist()))
    assert iou(mean.threshold) > iou(0.5)
