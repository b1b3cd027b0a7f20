"""What a training works with: that of the whole run, and that of one stage."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from segtrain.config import Config
from segtrain.data import Pictures
from segtrain.data.loading import Batches, eval_batches, train_batches
from segtrain.data.transforms import train_transform
from segtrain.data.workers import check_shared_memory, resolve_workers
from segtrain.devices import (
    Autocast,
    autocast_for,
    describe_device,
    keep_freed_memory,
    resolve_device,
    resolve_precision,
    set_float32_arithmetic,
)
from segtrain.distributed import World
from segtrain.runs import RunFolder
from segtrain.training.logs import RunLog
from segtrain.training.losses import LossFn, build_loss
from segtrain.training.start import Start
from segtrain.training.step_graph import StepGraph


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What stays as it is from the first stage to the last."""

    config: Config
    run: RunFolder
    world: World
    log: RunLog
    device: torch.device
    autocast: Autocast
    use_scaler: bool
    """fp16 has so small a range that gradients are scaled up."""
    train_source: Pictures
    val_source: Pictures
    data: dict[str, Any]
    """What checkpoints say of the pictures."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What a stage of the training works with."""

    number: int
    config: Config
    train_set: Batches
    val_set: Batches
    loss_fn: LossFn
    graph: StepGraph | None


def open_setting(start: Start, log: RunLog) -> Setting:
    """Resolve device and precision, and say what was taken and what the data sets have to tell.

    Raises:
        UsageError: the device or the precision is not there.
    """
    config, world = start.config, start.world
    device = resolve_device(config.train.device, world.local_rank if world.size > 1 else None)
    precision = resolve_precision(config.train.precision, device)
    set_float32_arithmetic(precision)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    processes = f", {world.size} processes" if world.size > 1 else ""
    log.line(f"device: {describe_device(device)}{processes}, precision {precision}")
    sources = {"training": start.train_source, "validation": start.val_source}
    counts = ", ".join(f"{len(source)} for {name}" for name, source in sources.items())
    log.line(f"images: {counts}")
    for name, source in sources.items():
        for note in source.notes:
            log.line(f"{name}: {note}")
        for reason, count in source.skipped.items():
            log.warn(f"{name}: {count} left out, {reason}")
    return Setting(
        config=config,
        run=start.run,
        world=world,
        log=log,
        device=device,
        autocast=autocast_for(precision, device),
        use_scaler=precision == "fp16",
        train_source=start.train_source,
        val_source=start.val_source,
        data={
            "train_manifest": start.train_source.manifest,
            "val_manifest": start.val_source.manifest,
            # torch's unsigned 64 bits can do little.
            "train_identities": torch.from_numpy(
                start.train_source.catalog.identities.view(np.int64).copy()
            ),
        },
    )


def open_stage(setting: Setting, number: int, config: Config, images_at_once: int) -> Stage:
    """Loaders and loss of a stage.

    Args:
        number: counted from 0.
        config: what the stage goes by.
        images_at_once: pictures that the memory holds; in validation, too.

    Raises:
        ResourceError: there is too little shared memory for the loader processes.
    """
    world = setting.world
    shared: dict[str, Any] = {
        "workers": resolve_workers(config.data.workers),
        "pin_memory": setting.device.type == "cuda",
        "rank": world.rank,
        "world_size": world.size,
    }
    train_set = train_batches(
        setting.train_source,
        train_transform(config.data),
        lengths=setting.train_source.lengths,
        weights=config.data.weights,
        batch_size=config.train.images_a_step,
        seed=config.train.seed,
        border_sigma=config.loss.border_sigma if config.loss.name == "border_ce" else None,
        **shared,
    )
    # Three bytes a pixel and one of its mask; of whole pictures, which are larger, at least that.
    a_picture = 4 * config.data.image_size**2
    check_shared_memory(
        shared["workers"],
        len(train_set),
        bytes_a_batch=a_picture * min(config.train.images_a_step, train_set.num_images),
    )
    val_set = eval_batches(
        setting.val_source,
        image_size=config.data.image_size,
        # By its own statistics a picture is judged alone.
        batch_size=1 if config.train.bn_eval == "batch" else images_at_once,
        **shared,
    )
    return Stage(
        number=number,
        config=config,
        train_set=train_set,
        val_set=val_set,
        loss_fn=build_loss(config.loss),
        graph=StepGraph() if config.train.cuda_graph else None,
    )
