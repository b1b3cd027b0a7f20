"""Images for visual inspection: masks over images, augmentations, and the person-area histogram."""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from segtrain.config.schema import DataConfig
from segtrain.data.datasets import ImageSelection
from segtrain.data.loader import TrainImages
from segtrain.data.sample import Sample
from segtrain.data.selection import Indices, is_negative
from segtrain.data.transforms import train_transform
from segtrain.doctor.image_scan import ScannedSplit
from segtrain.errors import DataError
from segtrain.imaging.contact_sheet import CELL, Cell, overlay, save_contact_sheet, sheet_section
from segtrain.runtime.files import write_bytes
from segtrain.types import PERSON

IMAGES_PER_SPLIT = 24
NUM_AUGMENTED, NUM_DRAWS = 6, 7

_COLUMNS = 6


def write_contact_sheet(path: Path, splits: Sequence[ScannedSplit]) -> None:
    """Write up to 24 images per split, with their masks overlaid, as one PNG.

    Raises:
        ResourceError: the file cannot be written.
    """
    sections = []
    for split in splits:
        cells = list(_split_cells(split))
        total, shown = len(split.images), len(cells)
        heading = f"{split.name}: {shown} of {total} images (pink: person, hatched: ignored)"
        sections.append(sheet_section(heading, cells, _COLUMNS))
    save_contact_sheet(path, sections)


def write_augmentations(path: Path, images: ImageSelection, config: DataConfig) -> None:
    """Write a row for each of six images: the original, and seven augmented versions.

    Raises:
        ResourceError: the file cannot be written.
    """
    train_images = TrainImages(images, train_transform(config), seed=0)
    cells = []
    indices = _choose_with_people(images, NUM_AUGMENTED + 2)
    if len(indices) > NUM_AUGMENTED:
        # Drop the extremes: a speck, or an image full of people, shows little.
        indices = indices[1 : NUM_AUGMENTED + 1]
    for index in indices:
        original = _load_sample(images, index)
        if original is None:
            continue
        cells.append(_cell(original, original.image_id))
        for epoch in range(NUM_DRAWS):
            augmented = train_images[epoch, index]
            if isinstance(augmented, Sample):
                cells.append(_cell(augmented, f"epoch {epoch + 1}"))
    heading = (
        f"augmentation {config.augment}, {config.image_size} pixels: first the original image, "
        "then its augmented versions"
    )
    save_contact_sheet(path, [sheet_section(heading, cells, NUM_DRAWS + 1)])


def write_person_area(path: Path, splits: Sequence[ScannedSplit]) -> None:
    """Write a histogram of the fraction of the image that people cover, as a PNG.

    Raises:
        ResourceError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    edges = np.linspace(0, 100, 21)
    percentages, weights, labels = [], [], []
    for split in splits:
        catalog = split.images.index
        with_people = 100 * catalog.person_fraction[~is_negative(catalog)]
        percentages.append(with_people)
        weights.append(np.full(len(with_people), 100 / max(len(with_people), 1)))
        num_negatives = len(catalog) - len(with_people)
        labels.append(f"{split.name}: {len(with_people)} with people, {num_negatives} without")
    axes.hist(percentages, bins=edges.tolist(), weights=weights, label=labels)
    axes.set(
        title="How much of the frame people cover",
        xlabel="share of the frame, %",
        ylabel="images with people, %",
        xlim=(0, 100),
        xticks=range(0, 101, 10),
    )
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=len(splits))
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110)
    write_bytes(path, png.getvalue())


def _split_cells(split: ScannedSplit) -> Iterator[Cell]:
    for index in _choose_images(split.images):
        sample = _load_sample(split.images, index)
        if sample is not None:
            yield _cell(sample, sample.image_id)


def _cell(sample: Sample, caption: str) -> Cell:
    """The image with its mask overlaid; the note is the person fraction."""
    fraction = float((sample.mask == PERSON).mean())
    note = "<1%" if 0 < fraction < 0.005 else f"{fraction:.0%}"
    return Cell(overlay(sample.image, sample.mask), caption, note)


def _choose_images(images: ImageSelection) -> list[int]:
    """Half by person fraction, the other half evenly spaced over the remaining images."""
    with_people = _choose_with_people(images, IMAGES_PER_SPLIT // 2)
    others = np.setdiff1d(np.arange(len(images)), with_people)
    return sorted({*with_people, *_choose_evenly(others, IMAGES_PER_SPLIT - len(with_people))})


def _choose_with_people(images: ImageSelection, count: int) -> list[int]:
    """Indices evenly spaced in the order of person fraction, smallest first."""
    fraction = images.index.person_fraction
    order = np.argsort(fraction, kind="stable")
    return _choose_evenly(order[fraction[order] > 0], count)


def _choose_evenly(indices: Indices, count: int) -> list[int]:
    positions = np.linspace(0, len(indices) - 1, min(count, len(indices))).round().astype(int)
    return indices[positions].tolist()  # type: ignore[no-any-return]


def _load_sample(images: ImageSelection, index: int) -> Sample | None:
    try:
        return images.sample(index, CELL)
    except DataError:
        return None  # `check_damaged` reports it
