"""`segtrain doctor`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from segtrain.cli.console import print_loading
from segtrain.cli.options import (
    DATA,
    OUTPUT,
    JsonOption,
    OverwriteOption,
    SetOption,
    data_root,
    default_note,
    flag,
    option,
)

_CHECKS = "Checks"


def doctor(
    data: Annotated[
        list[str] | None,
        typer.Argument(
            help="Roots in COCO layout or with images/ and masks/. "
            + default_note("$SEGTRAIN_DATA, else only the machine is checked"),
            show_default=False,
        ),
    ] = None,
    learning: Annotated[
        bool,
        typer.Option(
            "--learning/--no-learning",
            rich_help_panel=_CHECKS,
            help="Overfit a small network on four images.",
        ),
    ] = True,
    device: Annotated[
        str | None, option(panel=_CHECKS, help="auto, cpu, cuda or cuda:N.", default="auto")
    ] = None,
    augment: Annotated[
        str | None,
        option(panel=DATA, help="paper, standard, strong or elastic.", default="paper"),
    ] = None,
    output: Annotated[
        Path | None,
        option(panel=OUTPUT, help="Folder for the images.", default="runs/doctor-<time>"),
    ] = None,
    show_augmentations: Annotated[
        bool,
        flag("--show-augmentations", panel=OUTPUT, help="Also show six augmented images."),
    ] = False,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
    set_: SetOption = None,
) -> None:
    """Find within a minute what would make a training fail, and how to fix it.

    Exit codes: 0 no findings; 10 warnings; 3 errors in the data; 5 errors of the machine.
    """
    from segtrain.config.resolve import load_config
    from segtrain.doctor.paths import resolve_output_dir

    flags = {"data.root": data_root(data), "data.augment": augment, "train.device": device}
    config = load_config(flags=flags, sets=set_ or [])
    folder = resolve_output_dir(output, Path(config.train.output), overwrite=overwrite)
    print_loading()
    from rich.console import Console

    from segtrain.doctor import report
    from segtrain.doctor.run import DoctorOptions, run_doctor

    diagnosis = run_doctor(
        DoctorOptions(
            config=config, output=folder, show_augmentations=show_augmentations, learning=learning
        )
    )
    if as_json:
        print(json.dumps(report.as_json(diagnosis), indent=2))
    else:
        Console().print(report.findings_table(diagnosis))
        print(report.summary_line(diagnosis))
    diagnosis.raise_error()
    if diagnosis.exit_code:
        raise typer.Exit(diagnosis.exit_code)
