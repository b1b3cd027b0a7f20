"""All runs of a folder, newest first, for people and for programs."""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from segtrain.errors import UsageError
from segtrain.overview.run import Run, State, looks_like_run, read_run
from segtrain.overview.words import age_in_words, printable

_STYLES: dict[State, str] = {
    "running": "bold cyan",
    "finished": "green",
    "stopped": "yellow",
    "begun": "",
    "unreadable": "bold red",
}


def read_runs(output: Path) -> list[Run]:
    """Every run in the folder `output`, newest first; damaged ones have a `problem`.

    Raises:
        UsageError: there is no such folder, or it is a run itself.
    """
    if not output.is_dir():
        raise UsageError(
            f"{output} is no folder of runs; segtrain train makes one, or name another"
        )
    if (output / "config.yaml").is_file():
        raise UsageError(f"{output} is a run itself; name the folder that it lies in")
    paths = [path for path in output.iterdir() if not _points_at_latest(path)]
    runs = [read_run(path) for path in paths if looks_like_run(path)]
    return sorted(runs, key=lambda run: (-run.changed, run.name))


def latest_of(output: Path) -> Path | None:
    """The folder that `latest` points at; None where there is no such link or it dangles."""
    link = output / "latest"
    return link.resolve() if link.is_symlink() and link.is_dir() else None


def runs_table(runs: Sequence[Run], latest: Path | None) -> Table:
    """A row a run, readable from 80 columns on."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    table.add_column("run", overflow="fold")
    table.add_column("model", overflow="fold", max_width=14)
    table.add_column("best person\nIoU (epoch)", justify="right", no_wrap=True)
    table.add_column("epochs", justify="right", no_wrap=True)
    table.add_column("age", justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for run in runs:
        # Text, not markup: a run may be called [red].
        name = Text(printable(run.name), style="bold" if _is(run, latest) else "")
        if _is(run, latest):
            name.append(" (latest)", style="not bold italic")
        table.add_row(
            name,
            Text(printable(run.model or "")),
            f"{run.best.iou:.4f} ({run.best.epoch})" if run.best else "",
            _epochs(run),
            age_in_words(run.age),
            Text(run.state, style=_STYLES[run.state]),
        )
    return table


def problem_lines(runs: Sequence[Run]) -> list[str]:
    """A line for each unreadable run: its name and what is wrong."""
    return [printable(f"{run.name}: {run.problem}") for run in runs if run.problem]


def as_json(runs: Sequence[Run], latest: Path | None) -> list[dict[str, Any]]:
    """An object of plain types for each run; null is what is not known."""
    return [
        {
            "name": run.name,
            "path": str(run.path),
            "latest": _is(run, latest),
            "state": run.state,
            "problem": run.problem,
            "model": run.model,
            "best_person_iou": run.best.iou if run.best else None,
            "best_epoch": run.best.epoch if run.best else None,
            "epochs_done": run.epochs_done,
            "epochs_planned": run.epochs_planned,
            "changed": datetime.fromtimestamp(run.changed, UTC).isoformat(timespec="seconds"),
        }
        for run in runs
    ]


def _points_at_latest(path: Path) -> bool:
    # `.latest.*`: what a kill leaves while the link is being moved.
    return path.is_symlink() and (path.name == "latest" or path.name.startswith(".latest."))


def _is(run: Run, latest: Path | None) -> bool:
    return latest is not None and run.path.resolve() == latest


def _epochs(run: Run) -> str:
    if run.epochs_planned is None:
        return ""
    return f"{run.epochs_done}/{run.epochs_planned}"
