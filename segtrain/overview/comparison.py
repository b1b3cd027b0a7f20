"""Two runs side by side: what was set differently, and what came of it."""

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

from segtrain.config import Config, differing_keys, tree_from_config
from segtrain.errors import CheckpointError, UsageError
from segtrain.overview.metrics import number
from segtrain.overview.run import Run, looks_like_run, read_run
from segtrain.overview.words import duration, printable

_NOT_SET = object()
# Each run's folder has its own, and the headings say it.
_SAYS_NOTHING = {"train.name"}


@dataclass(frozen=True)
class Pair:
    """Two readable runs, the names that tell them apart, and their configurations."""

    runs: tuple[Run, Run]
    labels: tuple[str, str]
    configs: tuple[Config, Config]

    @property
    def differences(self) -> list[str]:
        """Dotted configuration keys in which the two differ; `stages` as a whole."""
        return [key for key in differing_keys(*self.configs) if key not in _SAYS_NOTHING]

    @property
    def same_loss(self) -> bool:
        """Whether their losses are the same function, so that their values can be compared."""
        one, other = ((c.loss, [s.loss for s in c.stages if s.loss]) for c in self.configs)
        return one == other

    @property
    def has_curves(self) -> bool:
        """Whether one of them has finished an epoch."""
        return any(run.rows for run in self.runs)

    @property
    def same_pictures(self) -> bool:
        """Whether both were validated on the same masks, as far as the numbers tell: those of the
        answer "all is person" depend on nothing else."""
        trivial = [
            number(run.rows[-1], "val/all_person_iou") if run.rows else None for run in self.runs
        ]
        one, other = trivial
        return one is None or other is None or math.isclose(one, other, rel_tol=1e-6)


@dataclass(frozen=True)
class Headline:
    """The numbers of a run that are looked at first; None is what is not known."""

    state: str
    epochs_done: int
    epochs_planned: int | None
    best_person_iou: float | None
    best_epoch: int | None
    last_loss: float | None
    images_per_second: float | None
    """Median over the epochs, for the first one is often slow."""
    seconds: float | None
    """Of all epochs together, validation and saving included."""


def pair_of(one: str, other: str, output: Path) -> Pair:
    """Find and read two runs, each a name in the folder `output` or a path.

    Raises:
        UsageError: one is not there, its configuration is damaged, or both are the same run.
        CheckpointError: its metrics.jsonl is damaged.
    """
    paths = [_find(one, output), _find(other, output)]
    if paths[0].resolve() == paths[1].resolve():
        raise UsageError(f"{one} and {other} are the same run; name two")
    first, second = (read_run(path) for path in paths)
    labels = (first.name, second.name)
    if first.name == second.name:
        labels = (str(first.path), str(second.path))
    return Pair((first, second), labels, (_config(first), _config(second)))


def headline(run: Run) -> Headline:
    """Sum a run up."""
    losses = [number(row, "train/loss") for row in run.rows]
    speeds = _known(run, "images_per_second")
    seconds = _known(run, "seconds")
    return Headline(
        state=run.state,
        epochs_done=run.epochs_done,
        epochs_planned=run.epochs_planned,
        best_person_iou=run.best.iou if run.best else None,
        best_epoch=run.best.epoch if run.best else None,
        last_loss=losses[-1] if losses else None,
        images_per_second=statistics.median(speeds) if speeds else None,
        seconds=sum(seconds) if seconds else None,
    )


def differences_table(pair: Pair) -> Table:
    """A row for each configuration key with two values; `-` where a run does not know the key."""
    table = _table(pair, "configuration")
    for key in pair.differences:
        table.add_row(key, *(Text(printable(_shown(_value(c, key)))) for c in pair.configs))
    return table


def numbers_table(pair: Pair) -> Table:
    """The headlines, the better IoU in bold."""
    both = [headline(run) for run in pair.runs]
    highest = max((h.best_person_iou for h in both if h.best_person_iou is not None), default=None)
    table = _table(pair, "numbers")
    table.add_row(
        "best person IoU",
        *(
            Text(_or_dash(h.best_person_iou, ".4f"), "bold" if h.best_person_iou == highest else "")
            for h in both
        ),
    )
    table.add_row("  in epoch", *(_or_dash(h.best_epoch, "d") for h in both))
    table.add_row("last training loss", *(_or_dash(h.last_loss, ".4f") for h in both))
    table.add_row("images a second", *(_or_dash(h.images_per_second, ".1f") for h in both))
    times = ("-" if h.seconds is None else duration(h.seconds) for h in both)
    table.add_row("time in all", *times)
    table.add_row("epochs", *(f"{h.epochs_done} of {h.epochs_planned}, {h.state}" for h in both))
    return table


def cautions(pair: Pair) -> list[str]:
    """Sentences on what in these numbers must not be compared."""
    found = []
    if not pair.same_pictures:
        found.append("the validation pictures differ: one IoU says little about the other")
    if not pair.same_loss:
        found.append("the losses are different functions: compare their shapes, not their values")
    return found


def as_json(pair: Pair, picture: Path | None) -> dict[str, Any]:
    """One object of plain types; null is what is not known or not set."""
    return {
        "runs": [
            {"name": run.name, "path": str(run.path), **vars(headline(run))} for run in pair.runs
        ],
        "differences": {
            key: [None if v is _NOT_SET else v for v in (_value(c, key) for c in pair.configs)]
            for key in pair.differences
        },
        "cautions": cautions(pair),
        "picture": None if picture is None else str(picture),
    }


def _find(name: str, output: Path) -> Path:
    for path in (output / name, Path(name)):
        if looks_like_run(path):
            # `latest` may point elsewhere tomorrow, and `.` is no name.
            return path.resolve() if path.is_symlink() or path.name in {"", ".."} else path
    names = [p.name for p in output.iterdir() if looks_like_run(p)] if output.is_dir() else []
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]!r}?" if close else "segtrain runs lists them"
    raise UsageError(f"there is no run {name!r} in {output} and none at that path; {hint}")


def _config(run: Run) -> Config:
    if run.problem is not None:
        kind = CheckpointError if "metrics.jsonl" in run.problem else UsageError
        raise kind(f"{run.path}: {run.problem}; repair it or choose another run")
    if run.config is None:
        raise UsageError(f"{run.path} has no config.yaml yet; wait until it trains")
    return run.config


def _known(run: Run, key: str) -> list[float]:
    values = (number(row, key) for row in run.rows)
    return [value for value in values if value is not None]


def _value(config: Config, dotted: str) -> Any:
    tree = tree_from_config(config)
    section, _, key = dotted.partition(".")
    return tree[section].get(key, _NOT_SET) if key else tree[section]


def _shown(value: Any) -> str:
    """A value as config.yaml has it; of stages only what they set."""
    if value is _NOT_SET:
        return "-"
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        value = [_without_empty(item) if isinstance(item, dict) else item for item in value]
    text = yaml.safe_dump(
        value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=math.inf
    )
    return text.removesuffix("...\n").rstrip()


def _without_empty(stage: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in stage.items() if value != {}}


def _table(pair: Pair, heading: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    table.add_column(heading, no_wrap=True)
    for label in pair.labels:
        table.add_column(Text(printable(label)), overflow="fold")
    return table


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
