"""What an epoch leaves for people: numbers, pictures, a line, and warnings of what looks wrong."""

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from rich.table import Table

from segtrain.images import Pixels
from segtrain.overview.words import duration
from segtrain.runs import RunFolder
from segtrain.training.logs import Row, RunLog, write_curves, write_history, write_samples

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

# A network that has found a cheap answer gives it for nearly every pixel.
_NEARLY_NONE, _NEARLY_ALL = 0.001, 0.999
_FEW = 0.02


class RunOutputs:
    """Writes into a run folder after each epoch; use it as a context manager.

    Args:
        tensorboard: write TensorBoard's files, too; its package must be there.
    """

    def __init__(self, run: RunFolder, log: RunLog, *, tensorboard: bool) -> None:
        self._run, self._log = run, log
        self._tensorboard = tensorboard
        self._board: SummaryWriter | None = None

    def __enter__(self) -> "RunOutputs":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._board is not None:
            self._board.close()

    def write(
        self, history: Sequence[Row], samples: Sequence[tuple[Pixels, Pixels, Pixels]]
    ) -> None:
        """Everything that follows from the last epoch.

        Args:
            history: a row for each epoch.
            samples: as in `segtrain.training.logs.write_samples`.

        Raises:
            ResourceError: the disk is full.
        """
        row = history[-1]
        write_history(self._run.metrics, history)
        write_curves(self._run.curves, history)
        if samples:
            write_samples(self._run.samples(row["epoch"]), samples)
        if self._tensorboard:
            # Not before there is something to write: a finished run started again stays as it is.
            if self._board is None:
                self._board = _open_board(self._run.path / "tensorboard")
            for key, value in row.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(key, value, row["epoch"])
            self._board.flush()

    def tell(self, history: Sequence[Row], *, num_epochs: int) -> None:
        """A line for the last epoch, and warnings of what looks wrong."""
        row = history[-1]
        best = max(history, key=lambda row: float(row["val/person_iou"]))
        self._log.line(
            f"epoch {row['epoch']}/{num_epochs}  loss {row['train/loss']:.4f}  "
            f"person IoU {row['val/person_iou']:.4f}{' (best)' if best is row else ''}  "
            f"{row['images_per_second']:.1f} images/s  {row['seconds']:.0f} s"
            f"{_left(row, num_epochs)}"
        )
        if row["skipped_steps"]:
            self._log.warn(
                f"epoch {row['epoch']}: steps left out, for their loss or gradient was not finite: "
                f"{row['skipped_steps']}"
            )
        if answer := collapsed(history):
            self._log.warn(
                f"for two epochs the network has called everything {answer}; "
                "lower --lr, or let `segtrain doctor` look at the masks"
            )


def collapsed(history: Sequence[Row]) -> str | None:
    """What the network calls every pixel, when it has begun to just now: for two epochs.

    None where it does not, or people really are (almost) everywhere or nowhere.
    """
    answers = [_cheap_answer(row) for row in history[-3:]]
    told_before = len(answers) == 3 and answers[0] == answers[1]
    if len(answers) < 2 or answers[-1] != answers[-2] or told_before:
        return None
    return answers[-1]


def _cheap_answer(row: Row) -> str | None:
    truth = row["val/all_person_iou"]
    if row["val/predicted_share"] < _NEARLY_NONE and truth > _FEW:
        return "background"
    if row["val/predicted_share"] > _NEARLY_ALL and truth < 1 - _FEW:
        return "person"
    return None


def summary_table(history: Sequence[Row], *, num_warnings: int) -> Table:
    """How a run has gone, for the end of it."""
    best = max(history, key=lambda row: float(row["val/person_iou"]))
    last = history[-1]
    seconds = sum(row["seconds"] for row in history)
    rates = [row["images_per_second"] for row in history]
    table = Table(title="training", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for label, value in (
        ("best person IoU (validation)", f"{best['val/person_iou']:.4f} in epoch {best['epoch']}"),
        ("  everything is person", f"{best['val/all_person_iou']:.4f}"),
        ("mean IoU then", f"{best['val/mean_iou']:.4f}"),
        ("last loss", f"{last['train/loss']:.4f}"),
        ("epochs, steps", f"{last['epoch']}, {last['global_step']:,}"),
        ("time", duration(seconds)),
        ("images a second", f"{sum(rates) / len(rates):.1f}"),
        ("share of time waiting for data", f"{last['data_wait']:.1%}"),
        ("steps left out", f"{sum(row['skipped_steps'] for row in history)}"),
        ("warnings", f"{num_warnings}"),
    ):
        table.add_row(label, value)
    return table


def _left(row: Row, num_epochs: int) -> str:
    """How long the rest will take, if each epoch takes as long as the last and none is spared."""
    seconds = (num_epochs - row["epoch"]) * row["seconds"]
    return f"  at most {duration(seconds)} left" if seconds >= 60 else ""


def _open_board(folder: Path) -> "SummaryWriter":
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder))
