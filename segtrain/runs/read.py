"""Read a run folder: config.yaml, metrics.jsonl and the state of the run."""

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from segtrain.config.resolve import load_config
from segtrain.config.schema import Config
from segtrain.errors import CheckpointError, UsageError, UserError
from segtrain.runs.folder import RunFolder
from segtrain.runtime.lock import is_busy

Row = dict[str, Any]
"""The metrics of one epoch, a line of metrics.jsonl."""

RunState = Literal["running", "finished", "stopped", "begun", "unreadable"]


@dataclass(frozen=True)
class BestEpoch:
    """The highest validation person IoU, in [0, 1], and its epoch."""

    iou: float
    epoch: int


@dataclass(frozen=True)
class Run:
    """A snapshot of a run folder."""

    name: str
    path: Path
    state: RunState
    changed: float
    """When its configuration or metrics were last written, in seconds since 1970."""
    config: Config | None = None
    """None if it is unreadable or not written yet."""
    rows: tuple[Row, ...] = ()
    """One for each epoch, in order."""
    problem: str | None = None
    """Why the run is unreadable."""

    @property
    def model(self) -> str | None:
        return self.config.model.name if self.config else None

    @property
    def epochs_done(self) -> int:
        return self.rows[-1]["epoch"] if self.rows else 0

    @property
    def epochs_planned(self) -> int | None:
        """Epochs of all stages; a stage that ended early counts only the epochs that it took."""
        return _num_planned_epochs(self.config, self.rows) if self.config else None

    @property
    def best(self) -> BestEpoch | None:
        """None before the first validation; the earliest of equal epochs, as in training."""
        ious = [(finite_number(row, "val/person_iou"), row["epoch"]) for row in self.rows]
        epochs = [BestEpoch(iou, epoch) for iou, epoch in ious if iou is not None]
        return max(epochs, key=lambda best: best.iou, default=None)

    @property
    def age(self) -> float:
        """Seconds since the last change."""
        return time.time() - self.changed


def read_run(path: Path) -> Run:
    """Read a run folder; a damaged one becomes a Run with a `problem`."""
    folder = RunFolder(path)
    changed = _last_changed(folder)
    try:
        rows = tuple(read_rows(folder.metrics))
        has_saved = folder.has_saved()
        config = _read_config(folder, required=has_saved or bool(rows))
        state = _state(config, rows, busy=is_busy(path), has_saved=has_saved)
    except (UserError, OSError, ValueError, RecursionError) as error:
        return Run(path.name, path, "unreadable", changed, problem=_describe(error, path))
    return Run(path.name, path, state, changed, config, rows)


def looks_like_run(path: Path) -> bool:
    """Whether a folder is a run folder, possibly of a run that has just started."""
    folder = RunFolder(path)
    marks = (folder.config, folder.metrics, folder.log, folder.last.parent, path / ".lock")
    try:
        return path.is_dir() and any(mark.exists() for mark in marks)
    except OSError:
        return True  # no permission to list it, which read_run reports


def read_rows(path: Path) -> list[Row]:
    """Read metrics.jsonl, one row for each epoch; empty if the file is missing.

    Skips a last line that was truncated by a kill. Each row has an `epoch` of at least 1. Other
    values may be missing; read them with `finite_number`.

    Raises:
        CheckpointError: another line is damaged.
        OSError: the file exists and cannot be read.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    lines = content.splitlines()
    rows = []
    for line_number, line in enumerate(lines, 1):
        row = _parse_row(line)
        if row is not None:
            rows.append(row)
        elif not (line_number == len(lines) and _is_truncated(content, line)):
            raise CheckpointError(f"{path} is damaged at line {line_number}", "repair that line")
    return rows


def finite_number(row: Row, key: str) -> float | None:
    """Return the finite number under `key`, or None if there is none."""
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        value = float(value)
    except OverflowError:
        return None
    return value if math.isfinite(value) else None


def _parse_row(line: bytes) -> Row | None:
    try:
        row = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or type(row.get("epoch")) is not int or row["epoch"] < 1:
        return None
    return row


def _is_truncated(content: bytes, last_line: bytes) -> bool:
    return last_line.startswith(b"{") and not content.endswith(b"\n")


def _state(
    config: Config | None, rows: tuple[Row, ...], *, busy: bool, has_saved: bool
) -> RunState:
    if busy:
        return "running"
    if config is not None and rows and _is_finished(config, rows):
        return "finished"
    return "stopped" if has_saved else "begun"


def _is_finished(config: Config, rows: tuple[Row, ...]) -> bool:
    last = rows[-1]
    # Early stopping ends the run only in its last stage.
    stopped_early = last.get("stopped_early") is True and (_stage(last) or math.inf) > len(
        config.stages
    )
    return stopped_early or last["epoch"] >= _num_planned_epochs(config, rows)


def _num_planned_epochs(config: Config, rows: tuple[Row, ...]) -> int:
    """Epochs of all stages; a stage that ended early counts only the epochs that it took."""
    lengths = [config.train.epochs, *(stage.epochs for stage in config.stages)]
    stage = (_stage(rows[-1]) if rows else None) or 1
    if stage > len(lengths):
        return sum(lengths)  # written with another configuration
    before = [row["epoch"] for row in rows if (_stage(row) or 1) < stage]
    return max(before, default=0) + sum(lengths[stage - 1 :])


def _stage(row: Row) -> int | None:
    """The stage, from 1; None if the row has none."""
    stage = row.get("stage")
    return stage if type(stage) is int and stage >= 1 else None


def _read_config(folder: RunFolder, *, required: bool) -> Config | None:
    if folder.config.exists():
        return load_config(folder.config)
    if required:
        raise UsageError(f"{folder.config} is missing", "copy it back")
    return None


def _last_changed(folder: RunFolder) -> float:
    times = [_modification_time(folder.config), _modification_time(folder.metrics)]
    known = [mtime for mtime in times if mtime is not None]
    return max(known) if known else _modification_time(folder.path) or 0.0


def _modification_time(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def _describe(error: Exception, path: Path) -> str:
    """Describe an error in one line that names the file without its folder."""
    if isinstance(error, OSError):
        return f"{Path(error.filename or path).name}: {error.strerror or error}"
    if isinstance(error, RecursionError):
        return "config.yaml is nested too deeply"
    message = str(error).replace(f"{path}/", "")
    if isinstance(error, UserError):
        message = message.rsplit("; ", 1)[0]  # the hint addresses who gave the file as an argument
    if ".yaml" not in message and ".jsonl" not in message:
        message = f"config.yaml: {message}"
    return " ".join(message.split())
