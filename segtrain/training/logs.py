"""What a run leaves for people: a log, numbers, curves and pictures of samples."""

import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import cv2
import numpy as np
from tqdm import tqdm

from segtrain.classes import IGNORE, PERSON
from segtrain.files import write_bytes, write_text
from segtrain.images import Pixels, write_image

Row = dict[str, Any]

_CELL_HEIGHT = 200
_GAP = 6
_PAPER = 32


class RunLog:
    """Lines on stdout that are kept in the run's log.txt too.

    Args:
        path: None says and keeps nothing: of several processes one talks.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.num_warnings = 0

    def line(self, text: str) -> None:
        self._write(text, sys.stdout)

    def warn(self, text: str) -> None:
        self.num_warnings += 1
        self._write(f"warning: {text}", sys.stderr)

    def _write(self, text: str, stream: TextIO) -> None:
        if self._path is None:
            return
        # tqdm takes a bar that is shown away, and draws it again below the line.
        with tqdm.external_write_mode(file=stream):
            print(text, file=stream, flush=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(text + "\n")


def write_history(path: Path, history: Sequence[Row]) -> None:
    """metrics.jsonl: one object an epoch."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in history))


def write_curves(path: Path, history: Sequence[Row]) -> None:
    """Loss, IoU and learning rate over the epochs as a PNG."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    epochs = [row["epoch"] for row in history]
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    loss_axes, iou_axes, rate_axes = figure.subplots(1, 3, width_ratios=[5, 5, 3])
    loss_axes.plot(epochs, [row["train/loss"] for row in history], ".-")
    loss_axes.set(title="training loss", xlabel="epoch", ylim=(0, None))
    rate_axes.plot(epochs, [row["lr"] for row in history], ".-")
    rate_axes.set(title="learning rate", xlabel="epoch", ylim=(0, None))
    for key, label in (("val/person_iou", "person IoU"), ("val/mean_iou", "mean IoU")):
        iou_axes.plot(epochs, [row[key] for row in history], ".-", label=label)
    trained = [row["train/person_iou"] for row in history]
    iou_axes.plot(
        epochs, trained, ".:", markersize=4, color="tab:cyan", label="person IoU, training crops"
    )
    best = max(history, key=lambda row: float(row["val/person_iou"]))
    iou_axes.plot(
        best["epoch"],
        best["val/person_iou"],
        "*",
        color="tab:blue",
        markersize=13,
        label=f"best: {best['val/person_iou']:.4f} in epoch {best['epoch']}",
    )
    iou_axes.axhline(
        history[-1]["val/all_person_iou"], ls="--", color="gray", label='"all is person"'
    )
    iou_axes.set(title="validation, original resolution", xlabel="epoch", ylim=(0, 1))
    # Below the curves: of a network that learns nothing they lie where a legend would.
    iou_axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, frameon=False)
    later = [
        (row["epoch"] - 0.5, row["stage"])
        for row, before in zip(history[1:], history, strict=False)
        if row["stage"] != before["stage"]
    ]
    for axes in (loss_axes, iou_axes, rate_axes):
        for begin, stage in later:
            axes.axvline(begin, ls=":", color="gray")
            axes.text(
                *(begin, 0.98, f" stage {stage}"),
                transform=axes.get_xaxis_transform(),
                va="top",
                color="gray",
            )
        axes.grid(alpha=0.3)
        # A single epoch would be put between fractions of one.
        axes.set_xlim(epochs[0] - 0.5, epochs[-1] + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
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
