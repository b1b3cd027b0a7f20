"""What a run leaves for people: a log, numbers, curves and pictures of samples."""

import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from segtrain.classes import IGNORE, PERSON
from segtrain.errors import CheckpointError
from segtrain.files import write_bytes, write_text
from segtrain.images import Pixels, write_image

Row = dict[str, Any]

_CELL_HEIGHT = 200
_GAP = 6
_PAPER = 32


class RunLog:
    """Lines on stdout that are kept in the run's log.txt too."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def line(self, text: str) -> None:
        print(text, flush=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(text + "\n")

    def warn(self, text: str) -> None:
        print(f"warning: {text}", file=sys.stderr, flush=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(f"warning: {text}\n")


def read_history(path: Path, *, until_epoch: int) -> list[Row]:
    """The rows of metrics.jsonl up to an epoch: a run may have been killed after the last save.

    Raises:
        CheckpointError: the file is there and damaged.
    """
    if not path.is_file():
        return []
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [row for row in rows if row["epoch"] <= until_epoch]
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{path} is damaged; move it away to continue without it") from None


def write_history(path: Path, history: Sequence[Row]) -> None:
    """metrics.jsonl: one object an epoch."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in history))


def write_curves(path: Path, history: Sequence[Row]) -> None:
    """Loss and validation IoU over the epochs as a PNG."""
    from matplotlib.figure import Figure

    epochs = [row["epoch"] for row in history]
    figure = Figure(figsize=(10, 4), layout="constrained")
    loss_axes, iou_axes = figure.subplots(1, 2)
    loss_axes.plot(epochs, [row["train/loss"] for row in history], ".-")
    loss_axes.set(title="training loss (cross-entropy)", xlabel="epoch", ylim=(0, None))
    for key, label in (("val/person_iou", "person IoU"), ("val/mean_iou", "mean IoU")):
        iou_axes.plot(epochs, [row[key] for row in history], ".-", label=label)
    iou_axes.axhline(
        history[-1]["val/all_person_iou"], ls="--", color="gray", label='"all is person"'
    )
    iou_axes.set(title="validation, original resolution", xlabel="epoch", ylim=(0, 1))
    iou_axes.legend(loc="lower right")
    for axes in (loss_axes, iou_axes):
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110)
    write_bytes(path, png.getvalue())


def write_samples(path: Path, rows: Sequence[tuple[Pixels, Pixels, Pixels]]) -> None:
    """A sheet with a row image | truth | prediction for each (image, mask, preds).

    image: H W 3 uint8. mask: H W uint8 in {0, 1, 255}. preds: H W uint8 in {0, 1}.
    """
    strips = [_strip(image, mask, preds) for image, mask, preds in rows]
    width = max(strip.shape[1] for strip in strips)
    header = np.full((28, width, 3), _PAPER, dtype=np.uint8)
    cv2.putText(
        header,
        "image | truth (gray: ignored) | prediction",
        (8, 19),
        cv2.FONT_HERSHEY_SIMPLEX,
        0.5,
        (230, 230, 230),
        1,
        cv2.LINE_AA,
    )
    padded = [
        np.pad(strip, ((0, _GAP), (0, width - strip.shape[1]), (0, 0)), constant_values=_PAPER)
        for strip in strips
    ]
    write_image(path, np.concatenate([header, *padded]), jpeg_quality=90)


def _strip(image: Pixels, mask: Pixels, preds: Pixels) -> Pixels:
    truth = np.select([mask == PERSON, mask == IGNORE], [255, 128], 0).astype(np.uint8)
    cells = []
    for picture in (image, truth, preds * np.uint8(255)):
        colour = picture if picture.ndim == 3 else np.repeat(picture[..., None], 3, axis=2)
        width = max(1, round(_CELL_HEIGHT * image.shape[1] / image.shape[0]))
        width = min(width, 4 * _CELL_HEIGHT)  # a long strip is shown squeezed
        cell = cv2.resize(colour, (width, _CELL_HEIGHT), interpolation=cv2.INTER_AREA)
        cells.append(np.pad(cell, ((0, 0), (0, _GAP), (0, 0)), constant_values=_PAPER))
    return np.concatenate(cells, axis=1).astype(np.uint8)
