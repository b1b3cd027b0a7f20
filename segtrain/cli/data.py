"""`segtrain prepare` and `segtrain demo`."""

import logging
from pathlib import Path
from typing import Annotated

import typer

from segtrain.cli.options import DATA, OUTPUT, SelectionSetOption, option

log = logging.getLogger(__name__)


def prepare(
    source: Annotated[str, typer.Argument(help="Data set to read; it is not changed.")],
    folder: Annotated[Path, typer.Argument(help="New folder for the prepared data set.")],
    short_side: Annotated[
        int,
        option(
            panel=OUTPUT,
            help="Short side of the written images; smaller images keep their size.",
            min=32,
            max=4096,
        ),
    ] = 320,
    workers: Annotated[
        int | None,
        option("--workers", "-j", panel=OUTPUT, help="Threads.", default="all cores", min=1),
    ] = None,
    set_: SelectionSetOption = None,
) -> None:
    """Filter and scale a data set once, for faster training. Run it again to continue."""
    from dataclasses import replace

    from segtrain.config.resolve import load_config
    from segtrain.runtime.cpu import available_cpus

    config = load_config(flags={"data.root": source}, sets=set_ or [])
    from segtrain.data.datasets import describe_roots, named_data_roots
    from segtrain.data.prepare import prepare as prepare_data

    [root], _ = named_data_roots(source) or ([Path(source)], "")
    log.info(f"data: {describe_roots([root])}")
    result = prepare_data(
        replace(config.data, root=str(root)),
        folder,
        short_side=short_side,
        workers=workers or available_cpus(),
    )
    counts = " and ".join(f"{count} {split}" for split, count in result.num_images.items())
    print(
        f"{counts} images, {result.num_bytes / 1e6:.0f} MB in {folder}"
        f"{f', {result.num_kept} of them from before' if result.num_kept else ''}"
    )
    print(f"next: segtrain train --data {folder}")
    if result.damaged:
        log.warning(f"{len(result.damaged)} images left out, first: {result.damaged[0]}")


def demo(
    folder: Annotated[Path, typer.Argument(help="New folder for the data set.")],
    train_images: Annotated[int, option(panel=DATA, help="Training images.", min=1)] = 512,
    val_images: Annotated[int, option(panel=DATA, help="Validation images.", min=1)] = 96,
    seed: Annotated[int, option(panel=DATA, help="Seed of the drawings.", min=0)] = 0,
) -> None:
    """Draw a data set of people in COCO layout, for trying things out."""
    from segtrain.demo.dataset import draw_demo_people

    draw_demo_people(folder, num_train=train_images, num_val=val_images, seed=seed)
    print(f"{train_images} + {val_images} drawn images in {folder}")
