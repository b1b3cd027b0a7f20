"""`segtrain train`."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any

from segtrain.cli.console import print_loading
from segtrain.cli.options import (
    CONFIGURATION,
    DATA,
    MODEL,
    OPTIMIZATION,
    OUTPUT,
    SetOption,
    data_root,
    flag,
    option,
)


def train(
    model: Annotated[
        str | None,
        option(
            panel=MODEL,
            help="unet, tiramisu, ...; `segtrain models` lists them.",
            default="unet",
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        option(
            panel=DATA,
            help="Root in COCO layout or with images/ and masks/; repeat it to mix data sets.",
            default="$SEGTRAIN_DATA, else drawn demo people",
        ),
    ] = None,
    image_size: Annotated[
        int | None,
        option(
            panel=DATA,
            help="Side of the training crops and short side in validation, in pixels.",
            default="224",
        ),
    ] = None,
    workers: Annotated[
        str | None,
        option(
            "--workers",
            "-j",
            panel=DATA,
            help="Loader processes: a number or auto.",
            default="auto",
        ),
    ] = None,
    epochs: Annotated[
        int | None,
        option(panel=OPTIMIZATION, help="Passes over the training images.", default="30"),
    ] = None,
    batch_size: Annotated[
        str | None,
        option(
            "--batch-size",
            "-b",
            panel=OPTIMIZATION,
            help="Images at a time: a number, or auto for as many as fit into memory.",
            default="4",
        ),
    ] = None,
    lr: Annotated[
        float | None,
        option(panel=OPTIMIZATION, help="Learning rate after warm-up.", default="0.001"),
    ] = None,
    precision: Annotated[
        str | None,
        option(panel=OPTIMIZATION, help="auto, fp32, tf32, bf16 or fp16.", default="auto"),
    ] = None,
    device: Annotated[
        str | None,
        option(panel=OPTIMIZATION, help="auto, cpu, cuda or cuda:N.", default="auto"),
    ] = None,
    seed: Annotated[
        int | None,
        option(panel=OPTIMIZATION, help="Seed of every random draw.", default="0"),
    ] = None,
    name: Annotated[
        str | None,
        option(panel=OUTPUT, help="Name of the run folder.", default="model and time"),
    ] = None,
    output: Annotated[
        str | None, option(panel=OUTPUT, help="Folder of all runs.", default="runs")
    ] = None,
    resume: Annotated[
        str | None,
        option(
            panel=OUTPUT,
            help="Continue a run folder or last.pt; auto: the run called --name, else the latest.",
        ),
    ] = None,
    save_every: Annotated[
        str | None,
        option(
            panel=OUTPUT,
            help="Save within epochs too, e.g. every 10m or 1h.",
            default="after each epoch",
        ),
    ] = None,
    tensorboard: Annotated[
        bool | None, flag("--tensorboard", panel=OUTPUT, help="Also write TensorBoard files.")
    ] = None,
    config: Annotated[
        Path | None,
        option(
            "--config",
            "-c",
            panel=CONFIGURATION,
            help="YAML file of differences from the defaults; see configs/.",
        ),
    ] = None,
    set_: SetOption = None,
) -> None:
    """Train a network and write a run folder with checkpoints, metrics, plots and samples."""
    from segtrain.config.resolve import load_config
    from segtrain.runs.folder import is_main_process, resolve_run_dir
    from segtrain.runtime.lock import refuse_if_busy

    flags: dict[str, Any] = {
        "model.name": model,
        "data.root": data_root(data),
        "data.image_size": image_size,
        "data.workers": workers,
        "optim.lr": lr,
        "train.epochs": epochs,
        "train.batch_size": batch_size,
        "train.precision": precision,
        "train.device": device,
        "train.output": output,
        "train.name": name,
        "train.seed": seed,
        "train.save_every": save_every,
        "train.tensorboard": tensorboard,
    }
    resolve = partial(load_config, config, flags=flags, sets=set_ or [])
    resolved = resolve()
    # Detect mistakes and a run in progress before torch is imported.
    if is_main_process():
        folder = resolve_run_dir(resume, Path(resolved.train.output), resolved.train.name)
        if folder is not None:
            refuse_if_busy(folder)
    print_loading()
    from segtrain.training.train import train as run_training

    run_training(resolved, resume=resume, resolve=resolve)
