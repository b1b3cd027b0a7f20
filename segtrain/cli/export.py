"""`segtrain export`."""

from pathlib import Path
from typing import Annotated, Literal

from segtrain.cli.console import print_loading
from segtrain.cli.options import DATA, OUTPUT, CheckpointOption, OverwriteOption, option


def export(
    checkpoint: CheckpointOption = None,
    format_: Annotated[
        Literal["onnx", "torch", "safetensors"],
        option("--format", panel=OUTPUT, help="ONNX, a torch.export program, or weights and JSON."),
    ] = "onnx",
    output: Annotated[
        Path | None,
        option(panel=OUTPUT, help="File to write.", default="named after the run"),
    ] = None,
    precision: Annotated[
        Literal["fp32", "fp16", "int8"],
        option(
            panel=OUTPUT,
            help="Precision of an ONNX file; below fp32 the drop in accuracy is measured.",
        ),
    ] = "fp32",
    overwrite: OverwriteOption = False,
    data: Annotated[
        list[str] | None,
        option(
            panel=DATA,
            help="Roots for measuring the drop in accuracy.",
            default="$SEGTRAIN_DATA, else the data sets of the training run",
        ),
    ] = None,
) -> None:
    """Write a network for other programs and verify it against torch."""
    from segtrain.export.options import ExportOptions, plan_export

    options = ExportOptions(
        checkpoint=checkpoint,
        format=format_,
        output=output,
        precision=precision,
        data=data,
        overwrite=overwrite,
    )
    plan = plan_export(options)
    print_loading()
    from segtrain.export.run import export as run_export

    run_export(plan)
