"""Pictures to look at: what the data shows says more than any number of it."""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from segtrain.classes import PERSON
from segtrain.config import DataConfig
from segtrain.data import Pictures
from segtrain.data.loading import TrainImages
from segtrain.data.sample import Sample
from segtrain.data.selection import is_negative
from segtrain.data.transforms import train_transform
from segtrain.doctor.inspection import Split
from segtrain.errors import DataError
from segtrain.files import write_bytes
from segtrain.images import Pixels
from segtrain.sheets import CELL, Cell, block, laid_over, write_sheet

PICTURES_A_SPLIT = 24
NUM_AUGMENTED, NUM_DRAWS = 6, 7

_COLUMNS = 6


def write_contact_sheet(path: Path, splits: Sequence[Split]) -> None:
    """Up to 24 pictures of each split with their masks laid over, as one PNG.

    Raises:
        ResourceError: it cannot be written.
    """
    blocks = []
    for split in splits:
        cells = list(_cells(split))
        total, shown = len(split.pictures), len(cells)
        heading = f"{split.name}: {shown} of {total} pictures (pink: person, hatched: ignored)"
        blocks.append(block(heading, cells, _COLUMNS))
    write_sheet(path, blocks)


def write_augmentations(path: Path, pictures: Pictures, config: DataConfig) -> None:
    """A row for each of six pictures: as it is, and as training will see it seven times.

    Raises:
        ResourceError: it cannot be written.
    """
    images = TrainImages(pictures, train_transform(config), seed=0)
    cells = []
    chosen = _with_people(pictures, NUM_AUGMENTED + 2)
    if len(chosen) > NUM_AUGMENTED:
        # Without the extremes: of a speck or a picture full of people there is little to see.
        chosen = chosen[1 : NUM_AUGMENTED + 1]
    for index in chosen:
        original = _sample_or_none(pictures, index)
        if original is None:
            continue
        cells.append(Cell(_laid_over(original), original.image_id, _share(original)))
        for epoch in range(NUM_DRAWS):
            drawn = images[epoch, index]
            if isinstance(drawn, Sample):
                cells.append(Cell(_laid_over(drawn), f"epoch {epoch + 1}", _share(drawn)))
    heading = (
        f"augmentation {config.augment}, {config.image_size} pixels: first the picture as it is, "
        "then what training sees of it"
    )
    write_sheet(path, [block(heading, cells, NUM_DRAWS + 1)])


def write_person_area(path: Path, splits: Sequence[Split]) -> None:
    """Histogram of the share of the frame that people cover, as a PNG.

    Raises:
        ResourceError: it cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    edges = np.linspace(0, 100, 21)
    shares, weights, labels = [], [], []
    for split in splits:
        catalog = split.pictures.catalog
        shown = 100 * catalog.person_share[~is_negative(catalog)]
        shares.append(shown)
        weights.append(np.full(len(shown), 100 / max(len(shown), 1)))
        negatives = len(catalog) - len(shown)
        labels.append(f"{split.name}: {len(shown)} with people, {negatives} without")
    axes.hist(shares, bins=edges.tolist(), weights=weights, label=labels)
    axes.set(
        title="How much of the frame people cover",
        xlabel="share of the frame, %",
        ylabel="pictures with people, %",
        xlim=(0, 100),
        xticks=range(0, 101, 10),
    )
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=len(splits))
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110)
    write_bytes(path, png.getvalue())


def _cells(split: Split) -> Iterator[Cell]:
    for index in _chosen(split.pictures):
        sample = _sample_or_none(split.pictures, index)
        if sample is not None:
            yield Cell(_laid_over(sample), sample.image_id, _share(sample))


def _laid_over(sample: Sample) -> Pixels:
    return laid_over(sample.image, sample.mask)


def _chosen(pictures: Pictures) -> list[int]:
    """Half of them evenly over all, half with people evenly over what these cover."""
    half = PICTURES_A_SPLIT // 2
    with_people = _with_people(pictures, half)
    others = np.setdiff1d(np.arange(len(pictures)), with_people)
    return sorted({*with_people, *_evenly(others, PICTURES_A_SPLIT - len(with_people))})


def _with_people(pictures: Pictures, number: int) -> list[int]:
    """Indices over the range of shares, smallest person first."""
    share = pictures.catalog.person_share
    by_share = np.argsort(share, kind="stable")
    return _evenly(by_share[share[by_share] > 0], number)


def _evenly(indices: "np.typing.NDArray[np.intp]", number: int) -> list[int]:
    places = np.linspace(0, len(indices) - 1, min(number, len(indices))).round().astype(int)
    return indices[places].tolist()  # type: ignore[no-any-return]


def _sample_or_none(pictures: Pictures, index: int) -> Sample | None:
    try:
        return pictures.sample(index, CELL)
    except DataError:
        return None  # the check of damaged pictures names it


def _share(sample: Sample) -> str:
    share = float((sample.mask == PERSON).mean())
    return "<1%" if 0 < share < 0.005 else f"{share:.0%}"
