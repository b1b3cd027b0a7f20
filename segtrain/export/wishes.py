"""What `segtrain export` is asked for. Imports no torch: mistakes show before it is there."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from segtrain.errors import UsageError
from segtrain.prediction.metadata import ExportPrecision
from segtrain.runs import find_checkpoint

FormatName = Literal["onnx", "torch", "safetensors"]

SUFFIXES: dict[FormatName, str] = {"onnx": ".onnx", "torch": ".pt2", "safetensors": ".safetensors"}


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """The command line.

    checkpoint: as in `segtrain.runs.find_checkpoint`.
    output: the file; None puts it into the current folder, called after the run.
    data: roots of data sets on which a lower precision is measured; None takes $SEGTRAIN_DATA, else
        what the network was trained on, else the drawn demo people.

    Raises:
        UsageError: they contradict each other.
    """

    checkpoint: Path | None = None
    format: FormatName = "onnx"
    output: Path | None = None
    precision: ExportPrecision = "fp32"
    overwrite: bool = False
    data: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.precision != "fp32" and self.format != "onnx":
            raise UsageError(
                f"--precision {self.precision} is for --format onnx; {self.format} holds fp32"
            )
        suffix = SUFFIXES[self.format]
        if self.output is not None and self.output.suffix != suffix:
            raise UsageError(f"--output {self.output} must end in {suffix} for this --format")
        if self.data is not None and self.precision == "fp32":
            raise UsageError("--data measures what --precision fp16 or int8 loses; drop it")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """From which checkpoint, and by what it was chosen, to which file."""

    wishes: Wishes
    checkpoint: Path
    chosen_by: str
    output: Path

    @property
    def beside(self) -> Path | None:
        """The JSON file that goes with a file of weights."""
        return self.output.with_suffix(".json") if self.wishes.format == "safetensors" else None


def plan_export(wishes: Wishes) -> Plan:
    """Find the checkpoint and see that the output can be written and overwrites nothing.

    Raises:
        CheckpointError: there is no checkpoint.
        UsageError: the output exists or is a folder, or it is to lie in what is none.
    """
    checkpoint, chosen_by = find_checkpoint(wishes.checkpoint)
    plan = Plan(
        wishes=wishes,
        checkpoint=checkpoint,
        chosen_by=chosen_by,
        output=wishes.output or Path(_name(checkpoint, wishes)),
    )
    for path in (plan.output, plan.beside):
        if path is not None:
            _check_place(path, overwrite=wishes.overwrite)
    return plan


def _check_place(path: Path, *, overwrite: bool) -> None:
    if path.is_dir():
        raise UsageError(f"{path} is a folder; choose another --output")
    if path.exists() and not overwrite:
        raise UsageError(f"{path} exists; use --overwrite or another --output")
    for folder in path.parents:
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"{folder} is a file, not a folder; choose another --output")


def _name(checkpoint: Path, wishes: Wishes) -> str:
    """runs/week/checkpoints/best.pt becomes week.onnx; in int8 week-int8.onnx."""
    path = checkpoint.resolve()
    in_a_run = path.parent.name == "checkpoints" and path.stem == "best"
    stem = path.parent.parent.name if in_a_run else path.stem
    precision = "" if wishes.precision == "fp32" else f"-{wishes.precision}"
    return f"{stem}{precision}{SUFFIXES[wishes.format]}"
