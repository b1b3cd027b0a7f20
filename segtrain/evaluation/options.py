"""The options of `segtrain eval`. Imports nothing heavy, so mistakes show before torch loads."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from segtrain.errors import UsageError
from segtrain.evaluation.label_check.paths import label_check_files
from segtrain.evaluation.report.paths import check_report_dir
from segtrain.inference.options import InferenceOptions
from segtrain.runs.folder import DEFAULT_OUTPUT
from segtrain.runtime.files import refuse_existing


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """What to evaluate, on which images, and what to write.

    Attributes:
        checkpoint: as in `segtrain.runs.folder.find_checkpoint`.
        predictions: a folder of masks to evaluate instead of a model.
        data: roots of data sets; None: $SEGTRAIN_DATA, else the data of the training.
        sets: `data.key=value`, a selection of images other than that of the training.
        workers: loader processes; "auto" chooses.
        inference: inference options; the precision is always float32.
        threshold: the lowest probability that counts as person.
        limit: evaluate this many images, evenly spaced; None: all.
        compare: the JSON file of an earlier `segtrain eval --json`.
        report: folder for the HTML report.
        label_check: whether to write a sheet of annotations that look wrong.
        overwrite: whether a report or sheet may be replaced.

    Raises:
        UsageError: an option is invalid or contradicts another.
    """

    checkpoint: Path | None = None
    predictions: Path | None = None
    data: Sequence[str] | None = None
    split: str = "val"
    sets: Sequence[str] = ()
    batch_size: int = 8
    workers: int | Literal["auto"] = "auto"
    inference: InferenceOptions = field(default_factory=lambda: InferenceOptions(tile=None))
    threshold: float = 0.5
    limit: int | None = None
    compare: Path | None = None
    report: Path | None = None
    label_check: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise UsageError(f"--threshold {self.threshold} must be above 0 and at most 1")
        if self.compare is not None and not self.compare.is_file():
            raise UsageError(f"--compare {self.compare}: no such file", "eval --json writes one")
        if self.label_check:
            refuse_torchrun("--label-check")
        if self.predictions is None:
            return
        model_options = {
            "--checkpoint": self.checkpoint,
            "--size": self.inference.size,
            "--bn": self.inference.bn,
            "--tile": self.inference.tile,
            "--tta": None if self.inference.tta == "none" else self.inference.tta,
        }
        for option, value in model_options.items():
            if value is not None:
                raise UsageError(
                    f"{option} needs a model, but --predictions evaluates masks",
                    f"drop {option} or --predictions",
                )

    def refuse_existing(self) -> None:
        """Raise UsageError if an output exists that may not be replaced."""
        if self.report:
            check_report_dir(self.report, overwrite=self.overwrite)
            if self.label_check:
                files = label_check_files(self.report)
                refuse_existing(files, overwrite=self.overwrite, option="--report")

    @property
    def label_check_dir(self) -> Path:
        """Folder of the sheet: that of the report, else a new folder next to the runs."""
        return self.report or DEFAULT_OUTPUT / f"label-check-{time.strftime('%Y%m%d-%H%M%S')}"


def refuse_torchrun(option: str) -> None:
    """Raise UsageError if torchrun started this process as one of several."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UsageError(f"{option} needs all images in one process", "run it without torchrun")
