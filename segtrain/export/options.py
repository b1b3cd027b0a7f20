"""Options of `segtrain export`. Imports nothing heavy: mistakes are reported before torch loads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from segtrain.errors import UsageError
from segtrain.runs.folder import find_checkpoint
from segtrain.runtime.files import refuse_existing

if TYPE_CHECKING:
    from segtrain.inference.onnx_metadata import ExportPrecision

FormatName = Literal["onnx", "torch", "safetensors"]

SUFFIXES: dict[FormatName, str] = {"onnx": ".onnx", "torch": ".pt2", "safetensors": ".safetensors"}


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Options of `segtrain export`.

    checkpoint: as in `segtrain.runs.folder.find_checkpoint`.
    output: the file; None means a file in the current folder, named after the run.
    data: roots of the datasets on which a lower precision is evaluated; None means $SEGTRAIN_DATA,
        else the training data, else the drawn demo people.

    Raises:
        UsageError: the options contradict each other.
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
                f"--precision {self.precision} requires --format onnx; {self.format} is fp32 only"
            )
        suffix = SUFFIXES[self.format]
        if self.output is not None and self.output.suffix != suffix:
            raise UsageError(
                f"--output {self.output} must end in {suffix} for --format {self.format}"
            )
        if self.data is not None and self.precision == "fp32":
            raise UsageError("--data is used only with --precision fp16 or int8", "drop it")


@dataclass(frozen=True, kw_only=True)
class ExportPlan:
    """The checkpoint, how it was chosen, and the output file."""

    options: ExportOptions
    checkpoint: Path
    chosen_by: str
    output: Path

    @property
    def json_path(self) -> Path | None:
        """The JSON file next to a safetensors file."""
        return self.output.with_suffix(".json") if self.options.format == "safetensors" else None


def plan_export(options: ExportOptions) -> ExportPlan:
    """Find the checkpoint, and check that the output can be written and overwrites nothing.

    Raises:
        CheckpointError: there is no checkpoint.
        UsageError: the output exists or is a folder, or one of its parents is a file.
    """
    checkpoint, chosen_by = find_checkpoint(options.checkpoint)
    plan = ExportPlan(
        options=options,
        checkpoint=checkpoint,
        chosen_by=chosen_by,
        output=options.output or Path(_default_name(checkpoint, options)),
    )
    for path in (plan.output, plan.json_path):
        if path is not None:
            _check_output_path(path, overwrite=options.overwrite)
    return plan


def _check_output_path(path: Path, *, overwrite: bool) -> None:
    if path.is_dir():
        raise UsageError(f"{path} is a folder", "choose another --output")
    refuse_existing([path], overwrite=overwrite, option="--output")
    for folder in path.parents:
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"{folder} is a file, not a folder", "choose another --output")


def _default_name(checkpoint: Path, options: ExportOptions) -> str:
    """week.onnx for runs/week/checkpoints/best.pt; week-int8.onnx in int8."""
    path = checkpoint.resolve()
    in_run = path.parent.name == "checkpoints" and path.stem == "best"
    stem = path.parent.parent.name if in_run else path.stem
    precision = "" if options.precision == "fp32" else f"-{options.precision}"
    return f"{stem}{precision}{SUFFIXES[options.format]}"
