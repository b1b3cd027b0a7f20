"""What the gallery knows of each picture, as columns of plain types for JSON."""

from typing import Any

import numpy as np

from segtrain.classes import BACKGROUND, PERSON
from segtrain.evaluation.figures import Floats, image_ious
from segtrain.evaluation.judgement import Judgement
from segtrain.evaluation.report.gallery import PHOTO_SIDE, shown_size
from segtrain.evaluation.slices import person_shares

_DIGITS = 6


def picture_columns(judgement: Judgement) -> dict[str, Any]:
    """Name → one value for each of N pictures, in the order of the records.

    Returns:
        index: number, by which its files are named. name: string.
        iou, share, missed, invented: in 0..1; the last three are shares of the frame.
        width, height: of the photo that is shown, pixels.
        parts: of each group of slices, in its order, N numbers of the part a picture is in.
    """
    records = judgement.totals.records
    frame = np.maximum(records["size"].astype(np.int64).prod(axis=1), 1)
    sizes = [shown_size(height, width, PHOTO_SIDE) for height, width in records["size"].tolist()]
    return {
        "index": records["index"].tolist(),
        "name": list(judgement.image_ids),
        "iou": _rounded(image_ious(records)),
        "share": _rounded(person_shares(records)),
        "missed": _rounded(records["confusion"][:, PERSON, BACKGROUND] / frame),
        "invented": _rounded(records["confusion"][:, BACKGROUND, PERSON] / frame),
        "width": [width for _, width in sizes],
        "height": [height for height, _ in sizes],
        "parts": _parts(judgement),
    }


def _parts(judgement: Judgement) -> list[list[int]]:
    # The parts of a group have no picture in common and are all of them.
    return [
        np.argmax(np.stack([part.members for part in parts]), axis=0).tolist()
        for parts in judgement.slice_groups.values()
    ]


def _rounded(values: Floats) -> list[float]:
    # Further digits would make the page twice as large and be seen by nobody.
    return [round(value, _DIGITS) for value in values.tolist()]
