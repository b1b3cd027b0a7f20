"""List all runs of a folder, newest first, as a table or as JSON."""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from segtrain.errors import UsageError
from segtrain.runs.format import escape_unprintable, format_age
from segtrain.runs.read import Run, RunState, looks_like_run, read_run

_STYLES: dict[RunState, str] = {
    "running": "bold cyan",
    "finished": "green",
    "stopped": "yellow",
    "begun": "",
    "unreadable": "bold red",
}


def read_runs(output: Path) -> list[Run]:
    """Read every run in the folder `output`, newest first; damaged ones have a `problem`.

    Raises:
        UsageError: there is no such folder, or it is a run folder.
    """
    if not output.is_dir():
        raise UsageError(
            f"{output} is not a folder of runs", "name another one, or run segtrain train first"
        )
    if (output / "config.yaml").is_file():
        raise UsageError(f"{output} is a run folder", "name its parent folder")
    paths = [path for path in output.iterdir() if not _is_latest_link(path)]
    runs = [read_run(path) for path in paths if looks_like_run(path)]
    return sorted(runs, key=lambda run: (-run.changed, run.name))


def latest_run_dir(output: Path) -> Path | None:
    """Return the target of the link `latest`; None if the link is missing or dangling."""
    link = output / "latest"
    return link.resolve() if link.is_symlink() and link.is_dir() else None


def runs_table(runs: Sequence[Run], latest: Path | None) -> Table:
    """A table with a row for each run, readable from 80 columns."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    table.add_column("run", overflow="fold")
    table.add_column("model", overflow="fold", max_width=14)
    table.add_column("best person\nIoU (epoch)", justify="right", no_wrap=True)
    table.add_column("epochs", justify="right", no_wrap=True)
    table.add_column("age", justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for run in runs:
        # Text, not markup: a run may be called [red].
        name = Text(escape_unprintable(run.name), style="bold" if _is_latest(run, latest) else "")
        if _is_latest(run, latest):
            name.append(" (latest)", style="not bold italic")
        table.add_row(
            name,
            Text(escape_unprintable(run.model or "")),
            f"{run.best.iou:.4f} ({run.best.epoch})" if run.best else "",
            "" if run.epochs_planned is None else f"{run.epochs_done}/{run.epochs_planned}",
            format_age(run.age),
            Text(run.state, style=_STYLES[run.state]),
        )
    return table


def problem_lines(runs: Sequence[Run]) -> list[str]:
    """A line with name and problem for each unreadable run."""
    return [escape_unprintable(f"{run.name}: {run.problem}") for run in runs if run.problem]


def as_json(runs: Sequence[Run], latest: Path | None) -> list[dict[str, Any]]:
    """An object of plain types for each run; unknown values are null."""
    return [
        {
            "name": run.name,
            "path": str(run.path),
            "latest": _is_latest(run, latest),
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


def _is_latest_link(path: Path) -> bool:
    # A process that is killed while replacing the link leaves `.latest.*`.
    return path.is_symlink() and (path.name == "latest" or path.name.startswith(".latest."))


def _is_latest(run: Run, latest: Path | None) -> bool:
    return latest is not None and run.path.resolve() == latest
