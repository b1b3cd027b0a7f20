"""The accuracy drop of a lower precision, measured on labeled images."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from segtrain.config.schema import DataConfig
from segtrain.data.datasets import ImageSelection, describe_roots, named_data_roots, open_selection
from segtrain.data.sample import Sample
from segtrain.demo.dataset import demo_people_root
from segtrain.errors import DataError
from segtrain.evaluation.confusion import metrics_from_counts
from segtrain.evaluation.counts import count_confusion
from segtrain.imaging.images import resize_short_side
from segtrain.inference.backend import Backend
from segtrain.runtime.progress import progress_bar
from segtrain.runtime.signals import raise_if_stopped
from segtrain.types import Image

log = logging.getLogger(__name__)


NUM_CALIBRATION_IMAGES, NUM_MEASUREMENT_IMAGES = 32, 64


@dataclass(frozen=True, kw_only=True)
class AccuracyDrop:
    """One model compared with another on the same images at their original resolution.

    before, after: global person IoU in 0..1.
    mean_difference, max_difference: of the probabilities, over all pixels.
    num_images: number of images.
    """

    before: float
    after: float
    mean_difference: float
    max_difference: float
    num_images: int

    def __str__(self) -> str:
        change = round(100 * (self.after - self.before), 2) + 0.0  # turns -0.0 into 0.0
        return (
            f"person IoU {100 * self.before:.2f} -> {100 * self.after:.2f} ({change:+.2f} points) "
            f"on {self.num_images} images; probabilities differ by "
            f"{self.mean_difference:.5f} on average, {self.max_difference:.3f} at most"
        )


def choose_measurement_data(config: DataConfig, roots: Sequence[str] | None) -> DataConfig:
    """The configuration with roots that exist.

    Args:
        roots: the user's choice; None means $SEGTRAIN_DATA, else the roots of the configuration,
            else the drawn demo people.
    """
    named, trained_on = named_data_roots(roots), named_data_roots(config.root)
    if named is None and trained_on is not None and all(map(Path.is_dir, trained_on[0])):
        named = trained_on
    if named is not None:
        paths = named[0]
        log.info(f"data to measure on: {describe_roots(paths)}")
    else:
        paths = (demo_people_root(),)
        log.warning(
            "the training data is not available, so the accuracy is measured on drawn people; "
            "choose other data with --data"
        )
    names = tuple(map(str, paths))
    return replace(config, root=names if len(names) > 1 else names[0], weights=None)


def load_calibration_images(config: DataConfig) -> list[Image]:
    """Training images, H W 3 uint8, resized as in validation.

    Raises:
        DataError: the dataset is malformed.
    """
    images = open_selection(config, "train").subsample(NUM_CALIBRATION_IMAGES)
    samples = _readable_samples(images)
    return [resize_short_side(sample.image, config.image_size) for sample in samples]


def measure_accuracy_drop(before: Backend, after: Backend, config: DataConfig) -> AccuracyDrop:
    """Compare two models on validation images.

    Raises:
        DataError: the dataset is malformed, or no image can be read.
    """
    images = open_selection(config, "val").subsample(NUM_MEASUREMENT_IMAGES)
    confusions = [np.zeros((2, 2), dtype=np.int64) for _ in range(2)]
    sum_of_differences, largest, num_pixels, num_images = 0.0, 0.0, 0, 0
    with progress_bar(total=len(images), desc="measuring") as bar:
        for sample in _readable_samples(images):
            probs = [np.asarray(backend.probs([sample.image])[0]) for backend in (before, after)]
            for confusion, prob in zip(confusions, probs, strict=True):
                confusion += count_confusion((prob >= 0.5).astype(np.uint8), sample.mask)
            difference = np.abs(probs[0] - probs[1])
            sum_of_differences += float(difference.sum(dtype=np.float64))
            largest = max(largest, float(difference.max()))
            num_pixels += difference.size
            num_images += 1
            raise_if_stopped()
            bar.update()
    if not num_images:
        raise DataError(
            "no readable validation image to measure the accuracy on",
            "choose a dataset with --data",
        )
    ious = [metrics_from_counts(confusion.tolist()).person_iou for confusion in confusions]
    return AccuracyDrop(
        before=ious[0],
        after=ious[1],
        mean_difference=sum_of_differences / num_pixels,
        max_difference=largest,
        num_images=num_images,
    )


def _readable_samples(images: ImageSelection) -> Iterator[Sample]:
    """The samples, without damaged ones."""
    for index in range(len(images)):
        with suppress(DataError):
            yield images.sample(index)
