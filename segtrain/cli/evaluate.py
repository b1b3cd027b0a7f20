"""`segtrain eval`."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from segtrain.cli.console import print_loading
from segtrain.cli.options import (
    DATA,
    INFERENCE,
    MODEL,
    OUTPUT,
    CheckpointOption,
    DeviceOption,
    JsonOption,
    OverwriteOption,
    SelectionSetOption,
    SizeOption,
    TtaOption,
    flag,
    option,
)
from segtrain.errors import UsageError


def evaluate(
    checkpoint: CheckpointOption = None,
    predictions: Annotated[
        Path | None,
        option(panel=MODEL, help="Evaluate the masks in this folder, from any tool, instead."),
    ] = None,
    data: Annotated[
        list[str] | None,
        option(
            panel=DATA,
            help="Root in COCO layout or with images/ and masks/; several are joined.",
            default="$SEGTRAIN_DATA, else the data sets of the training run",
        ),
    ] = None,
    split: Annotated[
        Literal["val", "train"], option(panel=DATA, help="Split to evaluate.")
    ] = "val",
    limit: Annotated[
        int | None,
        option(panel=DATA, help="Evaluate on this many images, evenly spaced.", min=1),
    ] = None,
    set_: SelectionSetOption = None,
    size: SizeOption = None,
    tta: TtaOption = "none",
    threshold: Annotated[
        float, option(panel=INFERENCE, help="Probability threshold for person.")
    ] = 0.5,
    tile: Annotated[
        int | None,
        option(
            panel=INFERENCE,
            help="Run the network on tiles with this side, a multiple of 32.",
            default="whole images",
        ),
    ] = None,
    bn: Annotated[
        Literal["running", "batch", "recalibrate", "all"] | None,
        option(
            "--bn",
            "--bn-eval",
            panel=INFERENCE,
            help="Batch-norm statistics; all compares the three.",
            default="as trained",
        ),
    ] = None,
    device: DeviceOption = "auto",
    batch_size: Annotated[
        int, option("--batch-size", "-b", panel=INFERENCE, help="Images at a time.", min=1)
    ] = 8,
    workers: Annotated[
        int | None,
        option("--workers", "-j", panel=INFERENCE, help="Loader processes.", default="auto", min=0),
    ] = None,
    report: Annotated[
        Path | None, option(panel=OUTPUT, help="New folder for an HTML report of the errors.")
    ] = None,
    compare: Annotated[
        Path | None,
        option(panel=OUTPUT, help="Earlier --json file to compare this result with."),
    ] = None,
    label_check: Annotated[
        bool,
        flag(
            "--label-check",
            panel=OUTPUT,
            help="Also write a contact sheet of suspicious annotations.",
        ),
    ] = False,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Evaluate a network, or any tool's masks, on labeled images at their original resolution."""
    from segtrain.evaluation.options import EvalOptions, refuse_torchrun
    from segtrain.inference.options import InferenceOptions
    from segtrain.runs.folder import is_main_process

    inference = InferenceOptions(device=device, size=size, tta=tta, tile=tile)
    options = EvalOptions(
        checkpoint=checkpoint,
        predictions=predictions,
        data=data,
        split=split,
        sets=set_ or [],
        batch_size=batch_size,
        workers="auto" if workers is None else workers,
        inference=inference if bn == "all" else replace(inference, bn=bn),
        threshold=threshold,
        limit=limit,
        compare=compare,
        report=report,
        label_check=label_check,
        overwrite=overwrite,
    )
    if bn == "all":
        if report or label_check:
            raise UsageError("--bn all prints metrics only", "drop --report and --label-check")
        refuse_torchrun("--bn all")
    if is_main_process():
        options.refuse_existing()
    print_loading()
    from segtrain.evaluation import evaluate as evaluation

    if bn == "all":
        evaluation.compare_batch_norms(options, as_json=as_json)
    else:
        evaluation.evaluate(options, as_json=as_json)
