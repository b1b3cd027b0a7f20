"""The curves of two runs in one picture."""

import io
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from segtrain.errors import UsageError
from segtrain.files import write_bytes
from segtrain.overview.comparison import Pair
from segtrain.overview.metrics import Row, number
from segtrain.overview.words import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Blue and orange of Okabe and Ito: told apart by colour-blind eyes, and in gray by their lightness.
_COLOURS = ("#0072B2", "#E69F00")
_FEW_EPOCHS = 40
_LONGEST_NAME = 80


def picture_path(given: Path | None, pair: Pair, output: Path, *, overwrite: bool) -> Path:
    """Where the picture goes: `given`, else `compare-A-B.png` in the folder of all runs.

    Raises:
        UsageError: it exists and nobody allowed to replace it, it is to be no PNG, or both names
            are too long for one file.
    """
    names = "-".join(run.name for run in pair.runs)
    path = given or output / f"compare-{names}.png"
    if path.suffix.lower() != ".png":
        raise UsageError(f"--output {path} must end in .png")
    try:
        exists = path.exists()
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}; give another --output") from None
    if exists and not overwrite:
        raise UsageError(f"{path} exists; give --overwrite or another --output")
    return path


def write_picture(path: Path, pair: Pair) -> Path | None:
    """Training loss and validation person IoU over the epochs, both runs in each, as a PNG.

    Returns:
        `path`; None, and nothing is written, where neither run has finished an epoch.

    Raises:
        ResourceError: it cannot be written.
    """
    if not pair.has_curves:
        return None
    figure = draw(pair)
    png = io.BytesIO()
    with warnings.catch_warnings():
        # A name may have letters that the font lacks: a box is drawn, which is no one's concern.
        warnings.simplefilter("ignore", UserWarning)
        figure.savefig(png, format="png", dpi=130)
    write_bytes(path, png.getvalue())
    return path


def draw(pair: Pair) -> "Figure":
    """The figure that `write_picture` writes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.4), layout="constrained")
    loss_axes, iou_axes = figure.subplots(1, 2)
    for run, colour in zip(pair.runs, _COLOURS, strict=True):
        _curve(loss_axes, run.rows, "train/loss", colour)
        _curve(iou_axes, run.rows, "val/person_iou", colour)
        if run.best is not None:
            x, y = run.best.epoch, run.best.iou
            iou_axes.plot(x, y, "o", color=colour, ms=9, mec="white", mew=1.5, zorder=3)
    unlike = "" if pair.same_loss else " (not the same function)"
    loss_axes.set_title(f"training loss{unlike}", loc="left")
    loss_axes.set_ylim(bottom=min(0.0, loss_axes.get_ylim()[0]))
    iou_axes.set_title("person IoU in validation (dot: best)", loc="left")
    for axes in (loss_axes, iou_axes):
        _tidy(axes)
    _name_the_runs(figure, loss_axes, pair)
    return figure


def _curve(axes: "Axes", rows: Sequence[Row], key: str, colour: str) -> None:
    """Gaps where the number is missing or not finite."""
    values = [number(row, key) for row in rows]
    axes.plot(
        [row["epoch"] for row in rows],
        [math.nan if value is None else value for value in values],
        color=colour,
        linewidth=2,
        marker="." if len(rows) <= _FEW_EPOCHS else "",
    )


def _tidy(axes: "Axes") -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _name_the_runs(figure: "Figure", axes: "Axes", pair: Pair) -> None:
    lines = list(axes.get_lines())
    names = [_short(printable(label)) for label in pair.labels]
    legend = figure.legend(
        lines,
        ["A", "B"],
        loc="outside upper center",
        ncols=2 if len("".join(names)) < _LONGEST_NAME else 1,
        frameon=False,
        fontsize=11,
    )
    for text, name, run in zip(legend.get_texts(), names, pair.runs, strict=True):
        # Set afterwards: a name may begin with _, which may hide it, or hold $, which is TeX.
        text.set_parse_math(False)
        text.set_text(f"{name}, best {run.best.iou:.4f}" if run.best else name)


def _short(name: str) -> str:
    if len(name) <= _LONGEST_NAME:
        return name
    half = (_LONGEST_NAME - 1) // 2
    return f"{name[:half]}…{name[-half:]}"
