"""Plot the curves of two runs."""

import io
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from segtrain.errors import UsageError
from segtrain.runs.comparison import RunPair
from segtrain.runs.format import escape_unprintable
from segtrain.runs.read import Row, finite_number
from segtrain.runtime.files import refuse_existing, write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's blue and orange, which also differ for color-blind people and, by their lightness,
# in gray.
_COLORS = ("#0072B2", "#E69F00")
_MAX_EPOCHS_WITH_MARKERS = 40
_MAX_NAME_LENGTH = 80


def resolve_plot_path(path: Path | None, pair: RunPair, output: Path, *, overwrite: bool) -> Path:
    """Return `path` or the default, `compare-A-B.png` in the folder of all runs.

    Raises:
        UsageError: the file exists and `overwrite` is false, its suffix is not .png, or the default
            name is too long.
    """
    names = "-".join(run.name for run in pair.runs)
    path = path or output / f"compare-{names}.png"
    if path.suffix.lower() != ".png":
        raise UsageError(f"--output {path} must end in .png")
    try:
        refuse_existing([path], overwrite=overwrite, option="--output")
    except OSError as error:  # the name is too long
        raise UsageError(f"{path}: {error.strerror}", "give another --output") from None
    return path


def write_plot(path: Path, pair: RunPair) -> Path | None:
    """Plot training loss and validation person IoU of both runs by epoch, as a PNG.

    Returns:
        `path`, or None without writing a file if neither run has finished an epoch.

    Raises:
        ResourceError: the file cannot be written.
    """
    if not pair.has_curves:
        return None
    figure = draw_curves(pair)
    png = io.BytesIO()
    with warnings.catch_warnings():
        # matplotlib warns about and draws a box for characters that the font lacks.
        warnings.simplefilter("ignore", UserWarning)
        figure.savefig(png, format="png", dpi=130)
    write_bytes(path, png.getvalue())
    return path


def draw_curves(pair: RunPair) -> "Figure":
    """Return the figure that `write_plot` saves."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.4), layout="constrained")
    loss_axes, iou_axes = figure.subplots(1, 2)
    for run, color in zip(pair.runs, _COLORS, strict=True):
        _plot_curve(loss_axes, run.rows, "train/loss", color)
        _plot_curve(iou_axes, run.rows, "val/person_iou", color)
        if run.best is not None:
            x, y = run.best.epoch, run.best.iou
            iou_axes.plot(x, y, "o", color=color, ms=9, mec="white", mew=1.5, zorder=3)
    note = "" if pair.same_loss else " (not the same function)"
    loss_axes.set_title(f"training loss{note}", loc="left")
    loss_axes.set_ylim(bottom=min(0.0, loss_axes.get_ylim()[0]))
    iou_axes.set_title("person IoU in validation (dot: best)", loc="left")
    for axes in (loss_axes, iou_axes):
        _style_axes(axes)
    _add_legend(figure, loss_axes, pair)
    return figure


def _plot_curve(axes: "Axes", rows: Sequence[Row], key: str, color: str) -> None:
    """Plot a metric by epoch, with gaps for missing and non-finite values."""
    values = [finite_number(row, key) for row in rows]
    axes.plot(
        [row["epoch"] for row in rows],
        [math.nan if value is None else value for value in values],
        color=color,
        linewidth=2,
        marker="." if len(rows) <= _MAX_EPOCHS_WITH_MARKERS else "",
    )


def _style_axes(axes: "Axes") -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _add_legend(figure: "Figure", axes: "Axes", pair: RunPair) -> None:
    lines = list(axes.get_lines())
    names = [_shorten(escape_unprintable(label)) for label in pair.labels]
    legend = figure.legend(
        lines,
        ["A", "B"],
        loc="outside upper center",
        ncols=2 if len("".join(names)) < _MAX_NAME_LENGTH else 1,
        frameon=False,
        fontsize=11,
    )
    for text, name, run in zip(legend.get_texts(), names, pair.runs, strict=True):
        # Set after creation: a leading _ may hide an entry, and $ would be parsed as TeX.
        text.set_parse_math(False)
        text.set_text(f"{name}, best {run.best.iou:.4f}" if run.best else name)


def _shorten(name: str) -> str:
    if len(name) <= _MAX_NAME_LENGTH:
        return name
    half = (_MAX_NAME_LENGTH - 1) // 2
    return f"{name[:half]}…{name[-half:]}"
