"""Compare two runs: the configuration keys in which they differ, and their metrics."""

import difflib
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich import box
from rich.table import Table
from rich.text import Text

from segtrain.config.resolve import config_to_dict, differing_keys
from segtrain.config.schema import Config
from segtrain.errors import CheckpointError, UsageError
from segtrain.runs.format import escape_unprintable, format_duration
from segtrain.runs.read import Run, finite_number, looks_like_run, read_run

_NOT_SET = object()
# The name is different in each run and is in the table headings.
_IGNORED_KEYS = {"train.name"}


@dataclass(frozen=True)
class RunPair:
    """Two readable runs, with distinct labels and their configurations."""

    runs: tuple[Run, Run]
    labels: tuple[str, str]
    configs: tuple[Config, Config]

    @property
    def differences(self) -> list[str]:
        """Dotted configuration keys in which the runs differ; `stages` counts as one key."""
        return [key for key in differing_keys(*self.configs) if key not in _IGNORED_KEYS]

    @property
    def same_loss(self) -> bool:
        """Whether both runs have the same loss function, so that the values are comparable."""
        first, second = ((c.loss, [s.loss for s in c.stages if s.loss]) for c in self.configs)
        return first == second

    @property
    def has_curves(self) -> bool:
        """Whether at least one of the runs has finished an epoch."""
        return any(run.rows for run in self.runs)

    @property
    def same_images(self) -> bool:
        """Whether both runs were validated on the same masks, as far as the metrics show.

        Compares the person IoU of predicting person everywhere, which depends only on the masks.
        """
        first, second = (
            finite_number(run.rows[-1], "val/all_person_iou") if run.rows else None
            for run in self.runs
        )
        return first is None or second is None or math.isclose(first, second, rel_tol=1e-6)


@dataclass(frozen=True)
class RunSummary:
    """The main metrics of a run; None if unknown."""

    state: str
    epochs_done: int
    epochs_planned: int | None
    best_person_iou: float | None
    best_epoch: int | None
    last_loss: float | None
    images_per_second: float | None
    """Median over the epochs, because the first one is often slow."""
    seconds: float | None
    """Sum over the epochs, including validation and saving."""


def read_run_pair(first: str, second: str, output: Path) -> RunPair:
    """Find and read two runs, each given as a name in the folder `output` or as a path.

    Raises:
        UsageError: a run is missing, its configuration is damaged, or both are the same run.
        CheckpointError: a metrics.jsonl is damaged.
    """
    paths = [_find_run(first, output), _find_run(second, output)]
    if paths[0].resolve() == paths[1].resolve():
        raise UsageError(f"{first} and {second} are the same run", "name two")
    a, b = (read_run(path) for path in paths)
    labels = (a.name, b.name) if a.name != b.name else (str(a.path), str(b.path))
    return RunPair((a, b), labels, (_require_config(a), _require_config(b)))


def summarize(run: Run) -> RunSummary:
    """Compute the main metrics of a run."""
    losses = [finite_number(row, "train/loss") for row in run.rows]
    speeds = _finite_numbers(run, "images_per_second")
    seconds = _finite_numbers(run, "seconds")
    return RunSummary(
        state=run.state,
        epochs_done=run.epochs_done,
        epochs_planned=run.epochs_planned,
        best_person_iou=run.best.iou if run.best else None,
        best_epoch=run.best.epoch if run.best else None,
        last_loss=losses[-1] if losses else None,
        images_per_second=statistics.median(speeds) if speeds else None,
        seconds=sum(seconds) if seconds else None,
    )


def differences_table(pair: RunPair) -> Table:
    """A row for each configuration key that differs; `-` if a run does not have the key."""
    table = _new_table(pair, "configuration")
    for key in pair.differences:
        values = (_format_value(_config_value(config, key)) for config in pair.configs)
        table.add_row(key, *(Text(escape_unprintable(value)) for value in values))
    return table


def metrics_table(pair: RunPair) -> Table:
    """The main metrics of both runs, with the better IoU in bold."""
    both = [summarize(run) for run in pair.runs]
    highest = max((s.best_person_iou for s in both if s.best_person_iou is not None), default=None)
    table = _new_table(pair, "metrics")
    table.add_row(
        "best person IoU",
        *(
            Text(
                _format_number(s.best_person_iou, ".4f"),
                "bold" if s.best_person_iou == highest else "",
            )
            for s in both
        ),
    )
    table.add_row("  in epoch", *(_format_number(s.best_epoch, "d") for s in both))
    table.add_row("last training loss", *(_format_number(s.last_loss, ".4f") for s in both))
    table.add_row("images per second", *(_format_number(s.images_per_second, ".1f") for s in both))
    times = ("-" if s.seconds is None else format_duration(s.seconds) for s in both)
    table.add_row("total time", *times)
    table.add_row("epochs", *(f"{s.epochs_done} of {s.epochs_planned}, {s.state}" for s in both))
    return table


def cautions(pair: RunPair) -> list[str]:
    """Sentences about metrics of these runs that are not comparable."""
    lines = []
    if not pair.same_images:
        lines.append("the validation images differ: do not compare the IoUs")
    if not pair.same_loss:
        lines.append("the losses are different functions: compare their shapes, not their values")
    return lines


def as_json(pair: RunPair, plot: Path | None) -> dict[str, Any]:
    """One object of plain types; null if a value is unknown or not set."""
    return {
        "runs": [
            {"name": run.name, "path": str(run.path), **vars(summarize(run))} for run in pair.runs
        ],
        "differences": {
            key: [
                None if value is _NOT_SET else value
                for value in (_config_value(config, key) for config in pair.configs)
            ]
            for key in pair.differences
        },
        "cautions": cautions(pair),
        "image": None if plot is None else str(plot),
    }


def _find_run(name: str, output: Path) -> Path:
    for path in (output / name, Path(name)):
        if looks_like_run(path):
            # Resolve `latest`, which may point elsewhere later, and `.`, which is not a name.
            return path.resolve() if path.is_symlink() or path.name in {"", ".."} else path
    names = [p.name for p in output.iterdir() if looks_like_run(p)] if output.is_dir() else []
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]!r}?" if close else "segtrain runs lists them"
    raise UsageError(f"no run {name!r} in {output}, and none at that path", hint)


def _require_config(run: Run) -> Config:
    if run.problem is not None:
        kind = CheckpointError if "metrics.jsonl" in run.problem else UsageError
        raise kind(f"{run.path}: {run.problem}", "repair it or choose another run")
    if run.config is None:
        raise UsageError(f"{run.path} has no config.yaml yet", "wait until training starts")
    return run.config


def _finite_numbers(run: Run, key: str) -> list[float]:
    values = (finite_number(row, key) for row in run.rows)
    return [value for value in values if value is not None]


def _config_value(config: Config, dotted_key: str) -> Any:
    tree = config_to_dict(config)
    section, _, key = dotted_key.partition(".")
    return tree[section].get(key, _NOT_SET) if key else tree[section]


def _format_value(value: Any) -> str:
    """Format a value as in config.yaml, with only the keys that a stage sets."""
    if value is _NOT_SET:
        return "-"
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        value = [_drop_empty(item) if isinstance(item, dict) else item for item in value]
    text = yaml.safe_dump(
        value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=math.inf
    )
    return text.removesuffix("...\n").rstrip()


def _drop_empty(stage: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in stage.items() if value != {}}


def _format_number(value: float | None, format_spec: str) -> str:
    return "-" if value is None else format(value, format_spec)


def _new_table(pair: RunPair, heading: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    table.add_column(heading, no_wrap=True)
    for label in pair.labels:
        table.add_column(Text(escape_unprintable(label)), overflow="fold")
    return table
