"""Outputs of an epoch: files in the run folder, a log line, and warnings."""

import logging
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from rich.table import Table

from segtrain.runs.folder import RunFolder
from segtrain.runs.format import format_duration
from segtrain.runs.read import Row
from segtrain.training.plots import write_curves, write_history, write_samples
from segtrain.types import Image, Mask

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

log = logging.getLogger(__name__)

# Thresholds for collapse to a constant prediction: the fraction of pixels predicted as person, and
# the fraction of true person (or background) pixels up to which that prediction is right.
_NEARLY_NONE, _NEARLY_ALL = 0.001, 0.999
_FEW = 0.02


class RunOutputs:
    """Writes the outputs of each epoch into a run folder; use it as a context manager.

    Args:
        tensorboard: also write TensorBoard files; its package must be installed.
    """

    def __init__(self, run: RunFolder, *, tensorboard: bool) -> None:
        self._run = run
        self._tensorboard = tensorboard
        self._writer: SummaryWriter | None = None

    def __enter__(self) -> "RunOutputs":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._writer is not None:
            self._writer.close()

    def write(self, history: Sequence[Row], samples: Sequence[tuple[Image, Mask, Mask]]) -> None:
        """Write all files after an epoch.

        Args:
            history: one row per epoch.
            samples: as in `segtrain.training.plots.write_samples`; without samples, no sheet.

        Raises:
            ResourceError: the disk is full.
        """
        row = history[-1]
        write_history(self._run.metrics, history)
        write_curves(self._run.curves, history)
        if samples:
            write_samples(self._run.samples(row["epoch"]), samples)
        if self._tensorboard:
            # Opened when there is something to write, so that resuming a finished run adds no file.
            if self._writer is None:
                self._writer = _open_summary_writer(self._run.path / "tensorboard")
            for key, value in row.items():
                if isinstance(value, int | float):
                    self._writer.add_scalar(key, value, row["epoch"])
            self._writer.flush()

    def report(self, history: Sequence[Row], *, num_epochs: int) -> None:
        """Log a line for the last epoch, and warn about skipped steps and collapse."""
        row = history[-1]
        best = max(history, key=lambda row: float(row["val/person_iou"]))
        log.info(
            f"epoch {row['epoch']}/{num_epochs}  loss {row['train/loss']:.4f}  "
            f"person IoU {row['val/person_iou']:.4f}{' (best)' if best is row else ''}  "
            f"{row['images_per_second']:.1f} images/s  {row['seconds']:.0f} s"
            f"{_time_left(row, num_epochs)}"
        )
        if row["skipped_steps"]:
            log.warning(
                f"epoch {row['epoch']}: steps skipped because of a loss or gradient that was not "
                f"finite: {row['skipped_steps']}"
            )
        if label := detect_collapse(history):
            log.warning(
                f"the network has predicted {label} everywhere for two epochs; "
                "lower --lr, or check the masks with `segtrain doctor`"
            )


def detect_collapse(history: Sequence[Row]) -> str | None:
    """Return the class that was predicted for nearly every pixel in exactly the last two epochs.

    Returns None without such a collapse, if it is older and was returned before, or if (almost) all
    pixels really have that class.
    """
    labels = [_constant_prediction(row) for row in history[-3:]]
    already_reported = len(labels) == 3 and labels[0] == labels[1]
    if len(labels) < 2 or labels[-1] != labels[-2] or already_reported:
        return None
    return labels[-1]


def _constant_prediction(row: Row) -> str | None:
    # The IoU of predicting person everywhere is the fraction of person pixels.
    person_fraction = row["val/all_person_iou"]
    if row["val/predicted_share"] < _NEARLY_NONE and person_fraction > _FEW:
        return "background"
    if row["val/predicted_share"] > _NEARLY_ALL and person_fraction < 1 - _FEW:
        return "person"
    return None


def summary_table(history: Sequence[Row], *, num_warnings: int) -> Table:
    """Summary of a run, printed at its end."""
    best = max(history, key=lambda row: float(row["val/person_iou"]))
    last = history[-1]
    seconds = sum(row["seconds"] for row in history)
    rates = [row["images_per_second"] for row in history]
    table = Table(title="training", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for label, value in (
        ("best person IoU (validation)", f"{best['val/person_iou']:.4f} in epoch {best['epoch']}"),
        ("  baseline: person everywhere", f"{best['val/all_person_iou']:.4f}"),
        ("mean IoU in that epoch", f"{best['val/mean_iou']:.4f}"),
        ("last loss", f"{last['train/loss']:.4f}"),
        ("epochs, steps", f"{last['epoch']}, {last['global_step']:,}"),
        ("time", format_duration(seconds)),
        ("images per second", f"{sum(rates) / len(rates):.1f}"),
        ("time waiting for data", f"{last['data_wait']:.1%}"),
        ("skipped steps", f"{sum(row['skipped_steps'] for row in history)}"),
        ("warnings", f"{num_warnings}"),
    ):
        table.add_row(label, value)
    return table


def _time_left(row: Row, num_epochs: int) -> str:
    """Time for the remaining epochs at the speed of the last one, without early stopping."""
    seconds = (num_epochs - row["epoch"]) * row["seconds"]
    return f"  at most {format_duration(seconds)} left" if seconds >= 60 else ""


def _open_summary_writer(folder: Path) -> "SummaryWriter":
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder))
