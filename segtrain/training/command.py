"""`segtrain train`, from the resolved command line to the last line printed."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console

from segtrain.config import dump_yaml
from segtrain.devices import resolve_device
from segtrain.distributed import joined
from segtrain.progress import silenced
from segtrain.training.fit import FitResult, fit
from segtrain.training.logs import RunLog
from segtrain.training.outputs import summary_table
from segtrain.training.start import Start, starting


def train(
    yaml_path: Path | None,
    *,
    flags: Mapping[str, Any],
    sets: Sequence[str],
    resume: str | None,
    device_name: str,
) -> None:
    """Train as asked and tell how it went.

    Raises:
        UserError: of any kind.
        Stopped: a signal came.
    """
    on_cuda = resolve_device(device_name).type == "cuda"
    with ExitStack() as stack:
        world = stack.enter_context(joined(on_cuda=on_cuda))
        if not world.is_first:
            stack.enter_context(silenced())
        start = stack.enter_context(
            starting(yaml_path, flags=flags, sets=sets, resume=resume, world=world)
        )
        log = RunLog(start.run.log if world.is_first else None)
        _tell_beginning(start, log)
        result = fit(start, log)
        if world.is_first:
            _tell_end(start, log, result)


def _tell_beginning(start: Start, log: RunLog) -> None:
    for note in start.notes:
        log.line(note)
    for warning in start.warnings:
        log.warn(warning)
    log.line(f"run: {start.run.path}, configuration:")
    log.line(dump_yaml(start.config).rstrip())


def _tell_end(start: Start, log: RunLog, result: FitResult) -> None:
    if result.history:
        Console().print(summary_table(result.history, num_warnings=log.num_warnings))
    log.line(
        f"best person IoU {result.best_iou:.4f} in epoch {result.best_epoch} of "
        f"{result.num_epochs}; look at {start.run.curves} and {start.run.path / 'samples'}"
    )
    log.line(f"next: segtrain eval --checkpoint {start.run.path}")
