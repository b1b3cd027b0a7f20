"""Options shared by several commands."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

MODEL, DATA, INFERENCE = "Model", "Data", "Inference"
OPTIMIZATION, CONFIGURATION, OUTPUT = "Optimization", "Configuration", "Output"


def option(*names: str, panel: str, help: str, default: str | None = None, **more: Any) -> Any:
    """An option with its help panel.

    Args:
        default: describes a default that is not a plain value, e.g. "as trained".
    """
    if default is not None:
        help += f" {default_note(default)}"
    return typer.Option(
        *names, rich_help_panel=panel, help=help, show_default=default is None, **more
    )


def default_note(default: str) -> str:
    """Describe a default as typer shows plain values; it puts other texts into parentheses."""
    return f"[dim]\\[default: {default}][/dim]"


def flag(*names: str, panel: str, help: str) -> Any:
    """A flag, which takes no value."""
    return typer.Option(*names, rich_help_panel=panel, help=help, show_default=False)


CheckpointOption = Annotated[
    Path | None,
    option(
        panel=MODEL,
        help="Checkpoint or run folder.",
        default="$SEGTRAIN_CHECKPOINT, else the best of the latest run",
    ),
]
DeviceOption = Annotated[str, option(panel=INFERENCE, help="auto, cpu, cuda or cuda:N.")]
SizeOption = Annotated[
    int | None,
    option(
        panel=INFERENCE,
        help="Short side of the network input in pixels.",
        default="as trained",
        min=32,
    ),
]
TtaOption = Annotated[
    Literal["none", "flip", "scales"],
    option(panel=INFERENCE, help="Test-time augmentation: flip, or flip and three scales."),
]
OverwriteOption = Annotated[
    bool, flag("--overwrite", panel=OUTPUT, help="Replace existing outputs.")
]
JsonOption = Annotated[bool, flag("--json", panel=OUTPUT, help="Print JSON on stdout.")]
SetOption = Annotated[
    list[str] | None,
    option(
        "--set",
        panel=CONFIGURATION,
        help="Any configuration key, e.g. --set model.base_channels=16. Repeatable.",
    ),
]
SelectionSetOption = Annotated[
    list[str] | None,
    option(
        "--set",
        panel=DATA,
        help="Select images, e.g. --set data.person_area=[0.2,0.7]. Repeatable.",
    ),
]


def data_root(roots: list[str] | None) -> str | list[str] | None:
    """Convert `--data` to a value of data.root: a string for one root, a list for several."""
    return (roots[0] if len(roots) == 1 else roots) if roots else None
