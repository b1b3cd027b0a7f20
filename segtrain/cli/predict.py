"""`segtrain predict`."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from segtrain.cli.console import print_loading
from segtrain.cli.options import (
    INFERENCE,
    OUTPUT,
    CheckpointOption,
    DeviceOption,
    OverwriteOption,
    SizeOption,
    TtaOption,
    flag,
    option,
)
from segtrain.errors import DataError, UsageError

_MASK = "Mask"


def predict(
    images: Annotated[
        list[str],
        typer.Argument(
            help="Images, videos, folders of images, quoted glob patterns, or - for an image on "
            "standard input."
        ),
    ],
    output: Annotated[
        Path,
        option(
            "--output",
            "-o",
            panel=OUTPUT,
            help="Folder for the results; for one input also a file (x.png, x.jpg), or - for PNG "
            "on standard output.",
        ),
    ] = Path("predictions"),
    save: Annotated[
        str | None,
        option(
            panel=OUTPUT,
            help="Comma-separated: mask, cutout, background, overlay, panel, probability.",
            default="mask,cutout",
        ),
    ] = None,
    background: Annotated[
        str | None,
        option(
            panel=OUTPUT,
            help="Put the people on an image, a color (#00ff00), blur (their own background) or "
            "transparent.",
        ),
    ] = None,
    panel: Annotated[
        bool,
        flag(
            "--panel",
            panel=OUTPUT,
            help="Also write original, new background and mask side by side.",
        ),
    ] = False,
    jsonl: Annotated[
        Path | None,
        option(panel=OUTPUT, help="File for one line of JSON per image, or - for standard output."),
    ] = None,
    overwrite: OverwriteOption = False,
    refine: Annotated[
        bool,
        flag("--refine", panel=_MASK, help="Align the edge with the image: hair, fingers."),
    ] = False,
    clean: Annotated[
        bool, flag("--clean", panel=_MASK, help="Drop small components and fill small holes.")
    ] = False,
    checkpoint: CheckpointOption = None,
    size: SizeOption = None,
    tta: TtaOption = "none",
    tile: Annotated[
        str,
        option(
            panel=INFERENCE,
            help="Run the network on tiles with this side; auto: above a megapixel; off: never.",
        ),
    ] = "auto",
    precision: Annotated[
        Literal["auto", "fp32", "tf32", "bf16", "fp16"],
        option(panel=INFERENCE, help="Precision of the forward pass."),
    ] = "fp32",
    device: DeviceOption = "auto",
    max_pixels: Annotated[
        int, option(panel=INFERENCE, help="Refuse larger images before decoding them.", min=1)
    ] = 100_000_000,
) -> None:
    """Cut people out of images and videos, at original resolution."""
    from segtrain.inference.options import InferenceOptions
    from segtrain.prediction.jobs import STDOUT, parse_tile, plan_jobs, select_kinds
    from segtrain.prediction.options import PredictOptions

    options = PredictOptions(
        checkpoint=checkpoint,
        inference=InferenceOptions(
            device=device, precision=precision, size=size, tta=tta, tile=parse_tile(tile)
        ),
        background=background or "blur",
        refine=refine,
        clean=clean,
        max_pixels=max_pixels,
        jsonl=jsonl,
        overwrite=overwrite,
    )
    jobs = plan_jobs(
        images,
        output,
        select_kinds(save, background, output, panel=panel),
        background=options.background,
        jsonl=jsonl,
        overwrite=overwrite,
    )
    has_videos = any(job.is_video for job in jobs)
    if has_videos and (save or panel or refine or clean or jsonl):
        raise UsageError(
            "--save, --panel, --refine, --clean and --jsonl are for images",
            "predict videos separately",
        )
    if checkpoint is None or checkpoint.suffix != ".onnx":
        print_loading()
    from segtrain.prediction.run import predict as run_prediction

    problems = run_prediction(jobs, options)
    what = f"{len(jobs)} {'files' if has_videos else 'images'}"
    if output != STDOUT:
        done = f"{len(jobs) - len(problems)} of {what} done, results in {output}"
        print(done, file=sys.stderr if jsonl == STDOUT else sys.stdout)
    if problems:
        raise DataError(f"{len(problems)} of {what} could not be used, first: {problems[0]}")
