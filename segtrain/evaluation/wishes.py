"""What `segtrain eval` is asked for. Imports nothing heavy: mistakes show before torch is there."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from segtrain.config import BnEval, Tta
from segtrain.errors import UsageError
from segtrain.evaluation.labels.outputs import check_outputs
from segtrain.evaluation.report.folder import refuse_existing
from segtrain.runs import DEFAULT_OUTPUT
from segtrain.tiles import check_side


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """The command line.

    checkpoint: as in `segtrain.runs.find_checkpoint`.
    predictions: a folder of masks to judge in place of a network.
    data: roots of data sets; None takes $SEGTRAIN_DATA, else what the network was trained on.
    sets: `data.key=value` for another selection than the one it was trained with.
    workers: loader processes; "auto" chooses.
    threshold, size, bn, tta, tile, limit: as in `segtrain.evaluation.judgement.Manner`; without
        size and bn it is as in training.
    compare: a file of an earlier `segtrain eval --json`.

    Raises:
        UsageError: they contradict each other.
    """

    checkpoint: Path | None = None
    predictions: Path | None = None
    data: Sequence[str] | None = None
    split: str = "val"
    sets: Sequence[str] = ()
    batch_size: int = 8
    workers: int | Literal["auto"] = "auto"
    device: str = "auto"
    threshold: float = 0.5
    size: int | None = None
    bn: BnEval | None = None
    tta: Tta = "none"
    tile: int | None = None
    limit: int | None = None
    compare: Path | None = None

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise UsageError(f"--threshold {self.threshold} is no probability above 0")
        if self.tile is not None:
            check_side(self.tile)
        if self.compare is not None and not self.compare.is_file():
            raise UsageError(f"--compare {self.compare} is no file; eval --json writes one")
        if self.predictions is None:
            return
        asked_of_a_network = {
            "--checkpoint": self.checkpoint,
            "--size": self.size,
            "--bn": self.bn,
            "--tile": self.tile,
            "--tta": None if self.tta == "none" else self.tta,
        }
        for option, value in asked_of_a_network.items():
            if value is not None:
                raise UsageError(f"{option} is for networks; --predictions takes masks as they are")


def refuse_torchrun(option: str) -> None:
    """Raise UsageError if torchrun has started this process as one of several."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UsageError(f"{option} needs all pictures in one process; go without torchrun")


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """What is written besides the figures.

    report: folder for the page; None for none.
    label_check: whether there is a sheet of suspicious annotations.
    overwrite: whether a page or a sheet that is there may be replaced.

    Raises:
        UsageError: they contradict each other.
    """

    report: Path | None = None
    label_check: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.label_check:
            refuse_torchrun("--label-check")

    def refuse_existing(self) -> None:
        """Raise UsageError if something is there that may not be replaced."""
        if self.report:
            refuse_existing(self.report, overwrite=self.overwrite)
        if self.label_check and self.report:
            check_outputs(self.report, overwrite=self.overwrite)

    def refuse_any(self, option: str) -> None:
        """Raise UsageError if any is wanted, for `option` has none."""
        if self.report or self.label_check:
            raise UsageError(f"{option} only gives figures; --report and --label-check go without")

    @property
    def label_folder(self) -> Path:
        """Where the sheet goes: beside the page, else to a new folder beside the runs."""
        return self.report or DEFAULT_OUTPUT / f"label-check-{time.strftime('%Y%m%d-%H%M%S')}"
