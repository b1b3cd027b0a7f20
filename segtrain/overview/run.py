"""What a run folder tells about its run: from config.yaml, metrics.jsonl and a look at the rest."""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from segtrain.config import Config, load_config
from segtrain.errors import UsageError, UserError
from segtrain.locking import is_busy
from segtrain.overview.metrics import Row, number, read_rows
from segtrain.runs import RunFolder

State = Literal["running", "finished", "stopped", "begun", "unreadable"]


@dataclass(frozen=True)
class Best:
    """The highest person IoU in validation, in [0, 1], and the epoch it was reached in."""

    iou: float
    epoch: int


@dataclass(frozen=True)
class Run:
    """A run as its folder shows it at one moment."""

    name: str
    path: Path
    state: State
    changed: float
    """When its configuration or its numbers were last written, seconds since 1970."""
    config: Config | None = None
    """None where it is unreadable or not written yet."""
    rows: tuple[Row, ...] = ()
    """An epoch each, in their order."""
    problem: str | None = None
    """Why it is unreadable."""

    @property
    def model(self) -> str | None:
        return self.config.model.name if self.config else None

    @property
    def epochs_done(self) -> int:
        return self.rows[-1]["epoch"] if self.rows else 0

    @property
    def epochs_planned(self) -> int | None:
        """Those of all stages; a stage that ended early counts what it took."""
        return _planned(self.config, self.rows) if self.config else None

    @property
    def best(self) -> Best | None:
        """None before the first validation; the earlier one of equals, as training keeps it."""
        scores = [(number(row, "val/person_iou"), row["epoch"]) for row in self.rows]
        known = [Best(iou, epoch) for iou, epoch in scores if iou is not None]
        return max(known, key=lambda best: best.iou, default=None)

    @property
    def age(self) -> float:
        """Seconds since it changed."""
        return time.time() - self.changed


def read_run(path: Path) -> Run:
    """Read a run folder; one that is damaged becomes a Run with a `problem`."""
    folder = RunFolder(path)
    changed = _changed(folder)
    try:
        rows = tuple(read_rows(folder.metrics))
        saved = folder.has_saved()
        config = _read_config(folder, needed=saved or bool(rows))
        state = _state(config, rows, busy=is_busy(path), saved=saved)
    except (UserError, OSError, ValueError, RecursionError) as error:
        return Run(path.name, path, "unreadable", changed, problem=_describe(error, path))
    return Run(path.name, path, state, changed, config, rows)


def looks_like_run(path: Path) -> bool:
    """Whether a folder is a run's, also of one that has only just begun."""
    folder = RunFolder(path)
    marks = (folder.config, folder.metrics, folder.log, folder.last.parent, path / ".lock")
    try:
        return path.is_dir() and any(mark.exists() for mark in marks)
    except OSError:
        return True  # it cannot be looked into, which reading it will say


def _state(config: Config | None, rows: tuple[Row, ...], *, busy: bool, saved: bool) -> State:
    if busy:
        return "running"
    if config is not None and rows and _is_finished(config, rows):
        return "finished"
    return "stopped" if saved else "begun"


def _is_finished(config: Config, rows: tuple[Row, ...]) -> bool:
    last = rows[-1]
    # With stages to come, training without progress goes on to the next.
    gave_up = last.get("stopped_early") is True and (_stage(last) or math.inf) > len(config.stages)
    return gave_up or last["epoch"] >= _planned(config, rows)


def _planned(config: Config, rows: tuple[Row, ...]) -> int:
    """Epochs in all: a stage that ended early counts what it took."""
    lengths = [config.train.epochs, *(stage.epochs for stage in config.stages)]
    stage = (_stage(rows[-1]) if rows else None) or 1
    if stage > len(lengths):
        return sum(lengths)  # written under another configuration
    before = [row["epoch"] for row in rows if (_stage(row) or 1) < stage]
    return max(before, default=0) + sum(lengths[stage - 1 :])


def _stage(row: Row) -> int | None:
    """Counted from 1; None where the row does not say."""
    stage = row.get("stage")
    return stage if type(stage) is int and stage >= 1 else None


def _read_config(folder: RunFolder, *, needed: bool) -> Config | None:
    if folder.config.exists():
        return load_config(folder.config)
    if needed:
        raise UsageError(f"{folder.config} is missing; copy it back")
    return None


def _changed(folder: RunFolder) -> float:
    times = [_written(folder.config), _written(folder.metrics)]
    known = [when for when in times if when is not None]
    return max(known) if known else _written(folder.path) or 0.0


def _written(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def _describe(error: Exception, path: Path) -> str:
    """One line that names the file, without the folder, which is named beside it."""
    if isinstance(error, OSError):
        return f"{Path(error.filename or path).name}: {error.strerror or error}"
    if isinstance(error, RecursionError):
        return "config.yaml is nested too deeply"
    message = str(error).replace(f"{path}/", "")
    if isinstance(error, UserError):
        message = message.rsplit("; ", 1)[0]  # the remedy is for who gave the file
    if ".yaml" not in message and ".jsonl" not in message:
        message = f"config.yaml: {message}"
    return " ".join(message.split())
