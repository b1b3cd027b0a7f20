"""What a lower precision costs, measured on labelled pictures."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from segtrain.config import DataConfig
from segtrain.data import Pictures, describe_roots, named_data_roots, open_pictures
from segtrain.data.demo import demo_people_root
from segtrain.data.sample import Sample
from segtrain.errors import DataError
from segtrain.evaluation.metrics import metrics_from_counts
from segtrain.evaluation.picture import confusion_of
from segtrain.images import Pixels, resize_short_side
from segtrain.prediction.network import Network
from segtrain.progress import progress_bar

NUM_TO_CALIBRATE, NUM_TO_MEASURE = 32, 64


@dataclass(frozen=True, kw_only=True)
class Loss:
    """Of one network against another on the same pictures at their original resolution.

    before, after: global person IoU in 0..1.
    mean_difference, max_difference: of the probabilities, over all pixels.
    num_pictures: on which it was measured.
    """

    before: float
    after: float
    mean_difference: float
    max_difference: float
    num_pictures: int

    def __str__(self) -> str:
        change = round(100 * (self.after - self.before), 2) + 0.0  # so that -0.0 has no sign
        return (
            f"person IoU {100 * self.before:.2f} -> {100 * self.after:.2f} ({change:+.2f} points) "
            f"on {self.num_pictures} pictures; probabilities differ by "
            f"{self.mean_difference:.5f} on average, {self.max_difference:.3f} at most"
        )


def data_to_measure_on(
    config: DataConfig, given: Sequence[str] | None, tell: Callable[[str], object]
) -> DataConfig:
    """The configuration with roots that are there.

    Args:
        given: roots the user named; None takes $SEGTRAIN_DATA, else those of the configuration,
            else drawn people.
        tell: takes a line that says which data it is.
    """
    named, trained_on = named_data_roots(given), named_data_roots(config.root)
    if named is None and trained_on is not None and all(map(Path.is_dir, trained_on[0])):
        named = trained_on
    if named is not None:
        roots = named[0]
        tell(f"data to measure on: {describe_roots(roots)}")
    else:
        roots = (demo_people_root(),)
        tell(
            "warning: the data it was trained on is not here, so the loss is measured on drawn "
            "people; --data names better ones"
        )
    names = tuple(map(str, roots))
    return replace(config, root=names if len(names) > 1 else names[0], weights=None)


def pictures_to_calibrate_on(config: DataConfig) -> list[Pixels]:
    """Training pictures H W 3 uint8, scaled as the network sees them in validation.

    Raises:
        DataError: the data set is malformed.
    """
    samples = _readable(open_pictures(config, "train").spread(NUM_TO_CALIBRATE))
    return [resize_short_side(sample.image, config.image_size) for sample in samples]


def measure_loss(before: Network, after: Network, config: DataConfig) -> Loss:
    """Ask both networks about validation pictures.

    Raises:
        DataError: the data set is malformed, or no picture can be read.
    """
    pictures = open_pictures(config, "val").spread(NUM_TO_MEASURE)
    confusions = [np.zeros((2, 2), dtype=np.int64) for _ in range(2)]
    sum_of_differences, largest, num_pixels, num_pictures = 0.0, 0.0, 0, 0
    with progress_bar(total=len(pictures), desc="measuring") as bar:
        for sample in _readable(pictures):
            answers = [np.asarray(network.probs([sample.image])[0]) for network in (before, after)]
            for confusion, probs in zip(confusions, answers, strict=True):
                confusion += confusion_of((probs >= 0.5).astype(np.uint8), sample.mask)
            difference = np.abs(answers[0] - answers[1])
            sum_of_differences += float(difference.sum(dtype=np.float64))
            largest = max(largest, float(difference.max()))
            num_pixels += difference.size
            num_pictures += 1
            bar.update()
    if not num_pictures:
        raise DataError("no validation picture can be read to measure the loss on; give --data")
    ious = [metrics_from_counts(confusion.tolist()).person_iou for confusion in confusions]
    return Loss(
        before=ious[0],
        after=ious[1],
        mean_difference=sum_of_differences / num_pixels,
        max_difference=largest,
        num_pictures=num_pictures,
    )


def _readable(pictures: Pictures) -> Iterator[Sample]:
    """The samples, without those whose file is damaged."""
    for index in range(len(pictures)):
        with suppress(DataError):
            yield pictures.sample(index)
