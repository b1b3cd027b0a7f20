"""Files of a run: metrics.jsonl, the curves, and sheets of sample predictions."""

import io
import json
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from segtrain.imaging.images import write_image
from segtrain.runs.read import Row
from segtrain.runtime.files import write_bytes, write_text
from segtrain.types import IGNORE, PERSON, Image, Mask

_CELL_HEIGHT = 200
_GAP = 6
_BACKDROP = 32


def write_history(path: Path, history: Sequence[Row]) -> None:
    """Write metrics.jsonl: one object per epoch."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in history))


def write_curves(path: Path, history: Sequence[Row]) -> None:
    """Plot loss, IoU and learning rate over the epochs as a PNG."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    epochs = [row["epoch"] for row in history]
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    loss_axes, iou_axes, lr_axes = figure.subplots(1, 3, width_ratios=[5, 5, 3])
    loss_axes.plot(epochs, [row["train/loss"] for row in history], ".-")
    loss_axes.set(title="training loss", xlabel="epoch", ylim=(0, None))
    lr_axes.plot(epochs, [row["lr"] for row in history], ".-")
    lr_axes.set(title="learning rate", xlabel="epoch", ylim=(0, None))
    for key, label in (("val/person_iou", "person IoU"), ("val/mean_iou", "mean IoU")):
        iou_axes.plot(epochs, [row[key] for row in history], ".-", label=label)
    train_ious = [row["train/person_iou"] for row in history]
    iou_axes.plot(
        epochs, train_ious, ".:", markersize=4, color="tab:cyan", label="person IoU, training crops"
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
    # Below the axes: the curves of a network that does not learn would lie behind the legend.
    iou_axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, frameon=False)
    stage_starts = [
        (row["epoch"] - 0.5, row["stage"])
        for row, before in zip(history[1:], history, strict=False)
        if row["stage"] != before["stage"]
    ]
    for axes in (loss_axes, iou_axes, lr_axes):
        for start, stage in stage_starts:
            axes.axvline(start, ls=":", color="gray")
            axes.text(
                *(start, 0.98, f" stage {stage}"),
                transform=axes.get_xaxis_transform(),
                va="top",
                color="gray",
            )
        axes.grid(alpha=0.3)
        # Otherwise the axis of a single epoch has fractional ticks.
        axes.set_xlim(epochs[0] - 0.5, epochs[-1] + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110)
    write_bytes(path, png.getvalue())


def write_samples(path: Path, samples: Sequence[tuple[Image, Mask, Mask]]) -> None:
    """Write a contact sheet with a row image | truth | prediction per sample.

    Args:
        path: a JPEG or PNG file.
        samples: (image, mask, preds): H W 3 uint8, H W uint8 in {0, 1, 255}, H W uint8 in {0, 1}.
    """
    rows = [_sample_row(image, mask, preds) for image, mask, preds in samples]
    width = max(row.shape[1] for row in rows)
    header = np.full((28, width, 3), _BACKDROP, dtype=np.uint8)
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
        np.pad(row, ((0, _GAP), (0, width - row.shape[1]), (0, 0)), constant_values=_BACKDROP)
        for row in rows
    ]
    write_image(path, np.concatenate([header, *padded]), jpeg_quality=90)


def _sample_row(image: Image, mask: Mask, preds: Mask) -> Image:
    truth = np.select([mask == PERSON, mask == IGNORE], [255, 128], 0).astype(np.uint8)
    cells = []
    for panel in (image, truth, preds * np.uint8(255)):
        color = panel if panel.ndim == 3 else np.repeat(panel[..., None], 3, axis=2)
        width = max(1, round(_CELL_HEIGHT * image.shape[1] / image.shape[0]))
        width = min(width, 4 * _CELL_HEIGHT)  # a very wide image is squeezed
        cell = cv2.resize(color, (width, _CELL_HEIGHT), interpolation=cv2.INTER_AREA)
        cells.append(np.pad(cell, ((0, 0), (0, _GAP), (0, 0)), constant_values=_BACKDROP))
    return np.concatenate(cells, axis=1).astype(np.uint8)
