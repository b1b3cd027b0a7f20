"""Set up a training run: the run folder, the data, the device, and the loaders of a stage."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from segtrain.config.resolve import dump_yaml
from segtrain.config.schema import Config
from segtrain.data.datasets import ImageSelection, describe_roots, named_data_roots, open_selection
from segtrain.data.loader import Batches, eval_batches, train_batches
from segtrain.data.transforms import train_transform
from segtrain.data.workers import check_shared_memory, resolve_workers
from segtrain.demo.dataset import demo_people_root, is_demo_root
from segtrain.errors import UsageError
from segtrain.models import build_model
from segtrain.models.encoder_unet import EncoderUNet
from segtrain.runs.folder import RunFolder, create_run
from segtrain.runtime.devices import (
    Autocast,
    ResolvedPrecision,
    autocast_for,
    describe_device,
    keep_freed_memory,
    resolve_device,
    resolve_precision,
    set_float32_precision,
)
from segtrain.runtime.distributed import DistributedContext
from segtrain.runtime.files import remove_temp_files, write_text
from segtrain.runtime.lock import lock_folder
from segtrain.runtime.logs import RunLog
from segtrain.training.losses import LossFn, build_loss
from segtrain.training.resume import (
    ResumePoint,
    continued_config,
    find_resume_point,
    set_damaged_aside,
    warn_of_other_step_size,
)
from segtrain.training.step_graph import StepGraph

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainContext:
    """Everything that stays the same in all stages of a run."""

    config: Config
    run: RunFolder
    world: DistributedContext
    device: torch.device
    precision: ResolvedPrecision
    train_images: ImageSelection
    val_images: ImageSelection
    resume_point: ResumePoint | None

    @cached_property
    def autocast(self) -> Autocast:
        """Creates the precision context of a forward pass."""
        return autocast_for(self.precision, self.device)

    @property
    def use_scaler(self) -> bool:
        """Whether gradients are scaled: the range of fp16 is too small for them."""
        return self.precision == "fp16"

    @cached_property
    def data(self) -> dict[str, Any]:
        """What checkpoints store about the images."""
        identities = self.train_images.index.identities
        return {
            "train_manifest": self.train_images.manifest,
            "val_manifest": self.val_images.manifest,
            # torch has little uint64 support: store as int64.
            "train_identities": torch.from_numpy(identities.view(np.int64).copy()),
        }


@dataclass(frozen=True, kw_only=True)
class StageData:
    """Loaders and loss of a stage; `number` starts at 0."""

    number: int
    config: Config
    train_loader: Batches
    val_loader: Batches
    loss_fn: LossFn
    graph: StepGraph | None


@contextmanager
def open_run(
    config: Config,
    *,
    resume: str | None,
    resolve: Callable[..., Config],
    world: DistributedContext,
    run_log: RunLog,
) -> Iterator[TrainContext]:
    """Open the data and, last, create and lock the run folder.

    An invalid command therefore leaves no files behind.

    Args:
        config, resume, resolve: as in `segtrain.training.train.train`.
        run_log: written to the run folder as soon as it exists.

    Raises:
        UserError: any kind of it.
    """
    point = world.read_on_main(lambda: find_resume_point(resume, config))
    if point is not None:
        config = continued_config(point, resolve, world)
    # Not earlier: a run that is resumed without --device continues on its own device.
    device = resolve_device(config.train.device, world.local_rank if world.size > 1 else None)
    precision = resolve_precision(config.train.precision, device)
    _check_options(config, fresh=point is None)
    # The main process fills the caches.
    with world.main_process_first():
        config = _with_data_root(config)
        train_images, val_images = (open_selection(config.data, s) for s in ("train", "val"))
    if point is not None:
        if point.checkpoint.data.get("train_manifest") not in {None, train_images.manifest}:
            log.warning("the training images have changed since the run started")
        warn_of_other_step_size(point, config, world)
    run = _run_folder(config, point, resume) if world.is_main else None
    with lock_folder(run.path) if run is not None else nullcontext():
        if run is not None:
            remove_temp_files(run.path)
            run_log.write_to(run.log)
            if point is not None:
                set_damaged_aside(run, point.path)
        run = RunFolder(Path(world.broadcast(str(run.path) if run is not None else "")))
        config = replace(config, train=replace(config.train, name=run.path.name))
        if world.is_main:
            write_text(run.config, dump_yaml(config))
        log.info(f"run: {run.path}, configuration:")
        log.info(dump_yaml(config).rstrip())
        ctx = TrainContext(
            config=config,
            run=run,
            world=world,
            device=device,
            precision=precision,
            train_images=train_images,
            val_images=val_images,
            resume_point=point,
        )
        _prepare_device(ctx)
        _log_images(ctx)
        yield ctx


def open_stage(ctx: TrainContext, number: int, config: Config, micro_batch_size: int) -> StageData:
    """Open the loaders and the loss of a stage.

    Args:
        number: starts at 0.
        config: the configuration of the stage.
        micro_batch_size: images that fit in memory; also the batch size of validation.

    Raises:
        ResourceError: too little shared memory for the loader processes.
    """
    shared: dict[str, Any] = {
        "workers": resolve_workers(config.data.workers),
        "pin_memory": ctx.device.type == "cuda",
        "rank": ctx.world.rank,
        "world_size": ctx.world.size,
    }
    train_loader = train_batches(
        ctx.train_images,
        train_transform(config.data),
        lengths=ctx.train_images.lengths,
        weights=config.data.weights,
        batch_size=config.train.effective_batch_size,
        seed=config.train.seed,
        border_sigma=config.loss.border_sigma if config.loss.name == "border_ce" else None,
        **shared,
    )
    # Three bytes per pixel and one for its mask. Whole images are larger, so this is a minimum.
    bytes_per_image = 4 * config.data.image_size**2
    images_per_batch = min(config.train.effective_batch_size, train_loader.num_images)
    check_shared_memory(
        shared["workers"], len(train_loader), bytes_per_batch=bytes_per_image * images_per_batch
    )
    val_loader = eval_batches(
        ctx.val_images,
        image_size=config.data.image_size,
        # With batch-norm statistics of the image itself, each image is evaluated alone.
        batch_size=1 if config.train.bn_eval == "batch" else micro_batch_size,
        **shared,
    )
    return StageData(
        number=number,
        config=config,
        train_loader=train_loader,
        val_loader=val_loader,
        loss_fn=build_loss(config.loss),
        graph=StepGraph() if config.train.cuda_graph else None,
    )


def _run_folder(config: Config, point: ResumePoint | None, resume: str | None) -> RunFolder:
    if point is not None:
        return RunFolder(point.path.parent.parent)
    return create_run(
        Path(config.train.output),
        config.train.name,
        config.model.name,
        reuse_unsaved=resume == "auto",
    )


def _check_options(config: Config, *, fresh: bool) -> None:
    """Check model arguments, weights files and optional packages before any file is written."""
    if config.train.tensorboard and find_spec("tensorboard") is None:
        raise UsageError("--tensorboard needs its package", "pip install 'segtrain[tensorboard]'")
    with torch.device("meta"):
        model = build_model(config.model.name, **config.model.kwargs)
    if isinstance(model, EncoderUNet):
        if fresh:
            model.read_pretrained()
    elif config.train.freeze_encoder_epochs:
        raise UsageError(
            "train.freeze_encoder_epochs needs a network with an encoder",
            "add e.g. --set model.encoder=resnet34",
        )


def _with_data_root(config: Config) -> Config:
    """Return `config` with the roots of the data: those given, or else drawn demo people."""
    named = named_data_roots(config.data.root)
    # The demo people of a resumed run may have been removed from the cache: draw them again.
    if named is not None and not any(map(is_demo_root, named[0])):
        roots, named_by = named
        log.info(f"data: {describe_roots(roots)}, by {named_by}")
    else:
        root = demo_people_root()
        roots = (root,)
        log.info(
            f"data: drawn demo people in {root}, since neither --data nor $SEGTRAIN_DATA is set. "
            "For real people, download COCO 2017 (cocodataset.org: train2017, val2017, "
            "annotations) and pass --data <its folder>"
        )
    names = tuple(map(str, roots))
    root_or_roots = names if len(names) > 1 else names[0]
    return replace(config, data=replace(config.data, root=root_or_roots))


def _prepare_device(ctx: TrainContext) -> None:
    set_float32_precision(ctx.precision)
    if ctx.device.type == "cuda":
        torch.cuda.set_device(ctx.device)
    else:
        keep_freed_memory()
    processes = f", {ctx.world.size} processes" if ctx.world.size > 1 else ""
    log.info(f"device: {describe_device(ctx.device)}{processes}, precision {ctx.precision}")


def _log_images(ctx: TrainContext) -> None:
    selections = {"training": ctx.train_images, "validation": ctx.val_images}
    counts = ", ".join(f"{len(images)} for {name}" for name, images in selections.items())
    log.info(f"images: {counts}")
    for name, images in selections.items():
        for note in images.notes:
            log.info(f"{name}: {note}")
        for reason, count in images.skipped.items():
            log.warning(f"{name}: {count} skipped, {reason}")
