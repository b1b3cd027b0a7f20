"""Write a label check: the sheet with the strongest issues of each kind, and the table of all."""

import csv
import io
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from segtrain.data.sample import Sample, SegmentationDataset
from segtrain.errors import DataError
from segtrain.evaluation.label_check.issues import ISSUE_KINDS, Box
from segtrain.evaluation.label_check.ranking import Crop, Ranking
from segtrain.imaging.contact_sheet import (
    OUTLINE_COLOR,
    Cell,
    draw_outline,
    hatch,
    resize_antialiased,
    resize_mask,
    save_contact_sheet,
    sheet_section,
)
from segtrain.runs.format import escape_unprintable
from segtrain.runtime.files import write_bytes
from segtrain.types import IGNORE, PERSON, Image

_SHEET_COLUMNS = 6
_MODEL_COLOR = (0, 225, 255)
_BOX_COLOR = (255, 60, 60)
_LEGEND = "yellow: annotation, blue: network, red: what is suspicious, hatched: ignored"

_TABLE_COLUMNS = ("kind", "rank", "score", "name", "image", "left", "top", "width", "height")
# Spreadsheets evaluate a cell that starts with one of these as a formula.
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


def write_sheet(path: Path, ranking: Ranking, dataset: SegmentationDataset) -> None:
    """Write a PNG with a section for each kind, also for kinds without issues.

    Raises:
        ResourceError: it cannot be written.
    """
    sections = []
    for name, kind in ISSUE_KINDS.items():
        cells = list(_cells(name, ranking, dataset))
        total = len(ranking.ranked(name))
        shown = f"{len(cells)} of {total} suspicious images" if total else "nothing suspicious"
        heading = f"{name} ({kind.description}): {shown}"
        sections.append(sheet_section(heading, cells, _SHEET_COLUMNS))
    sections.append(sheet_section(_LEGEND, [], _SHEET_COLUMNS))
    save_contact_sheet(path, sections)


def _cells(kind: str, ranking: Ranking, dataset: SegmentationDataset) -> Iterator[Cell]:
    for ranked, crop in ranking.crops(kind):
        try:
            sample = dataset.sample(ranked.index)
        except DataError:
            continue  # damaged since it was evaluated; the table still lists it
        image = draw_issue(sample, crop, ranked.issue.box)
        yield Cell(
            image, escape_unprintable(dataset.name(ranked.index)), f"{ranked.issue.score:.2f}"
        )


def draw_issue(sample: Sample, crop: Crop, box: Box) -> Image:
    """Draw the cropped part of the image, h w 3 uint8, with both outlines and the box."""
    view, size = crop.view, (crop.levels.shape[0], crop.levels.shape[1])
    image = np.ascontiguousarray(resize_antialiased(sample.image[view.slices], size))
    mask = resize_mask(sample.mask[view.slices], size)
    hatch(image, mask == IGNORE)
    draw_outline(image, crop.levels >= 128, _MODEL_COLOR)
    draw_outline(image, mask == PERSON, OUTLINE_COLOR)
    scale = size[0] / view.height, size[1] / view.width
    left, top = round((box.left - view.left) * scale[1]), round((box.top - view.top) * scale[0])
    right, bottom = left + round(box.width * scale[1]) - 1, top + round(box.height * scale[0]) - 1
    cv2.rectangle(image, (left, top), (right, bottom), _BOX_COLOR, 1)
    return image


def write_table(path: Path, ranking: Ranking, dataset: SegmentationDataset) -> None:
    """Write a CSV in UTF-8 with a row for each issue, kind by kind, strongest first.

    `name` is the name of the image in its split, with a leading apostrophe if a spreadsheet would
    read it as a formula. `image` is the absolute path, never changed. Names that are not UTF-8 keep
    their bytes.

    Raises:
        ResourceError: it cannot be written.
    """
    table = io.StringIO(newline="")
    writer = csv.writer(table)
    writer.writerow(_TABLE_COLUMNS)
    for kind in ISSUE_KINDS:
        for rank, ranked in enumerate(ranking.ranked(kind), start=1):
            name = dataset.name(ranked.index)
            writer.writerow(
                [
                    kind,
                    rank,
                    f"{ranked.issue.score:.4f}",
                    f"'{name}" if name.startswith(_FORMULA_STARTS) else name,
                    dataset.image_path(ranked.index).absolute(),
                    *ranked.issue.box,
                ]
            )
    write_bytes(path, table.getvalue().encode("utf-8", "surrogateescape"))
