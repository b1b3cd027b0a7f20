"""Set up an evaluation: open the checkpoint or the folder of masks, and select the images."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from segtrain.checkpoint import Checkpoint, load_checkpoint, restore_model
from segtrain.config.resolve import config_to_dict, load_config
from segtrain.config.schema import Config, DataConfig
from segtrain.data.datasets import ImageSelection, describe_roots, named_data_roots, open_selection
from segtrain.data.loader import train_batches
from segtrain.data.transforms import train_transform
from segtrain.data.workers import resolve_workers, worker_errors
from segtrain.errors import DataError, UsageError
from segtrain.evaluation.baselines import MeanMask, compute_mean_mask
from segtrain.evaluation.options import EvalOptions
from segtrain.evaluation.predictions import (
    MaskFolder,
    MaskFolderPredictions,
    ModelPredictions,
    PredictionSource,
)
from segtrain.evaluation.result import EvalData, ModelInfo
from segtrain.models.batch_norm import NUM_TO_RECALIBRATE, recalibrate
from segtrain.runs.folder import find_checkpoint
from segtrain.runtime.devices import autocast_for, describe_device, move_model
from segtrain.runtime.distributed import DistributedContext
from segtrain.runtime.progress import progress_bar

log = logging.getLogger(__name__)

Roots = tuple[Path, ...]

# The keys of `data.` that select images and define which of their pixels are person.
_SELECTION_KEYS = {f.name for f in fields(DataConfig)} - {
    *("root", "weights", "image_size", "augment", "scale", "whole", "workers"),
}
# More masks hardly change their mean.
_MAX_MASKS_IN_MEAN = 1000


@dataclass(frozen=True, kw_only=True)
class EvalSetup:
    """What is evaluated on which images.

    options: with size and batch-norm statistics resolved.
    mean_mask: of the training images; None if there are none.
    """

    options: EvalOptions
    source: PredictionSource
    model_info: ModelInfo
    data: EvalData
    images: ImageSelection
    mean_mask: MeanMask | None


def setup_evaluation(
    options: EvalOptions, *, device: torch.device, world: DistributedContext
) -> EvalSetup:
    """Open the checkpoint or the folder of masks, and the images.

    Raises:
        UserError: of any kind.
        Stopped: a signal came.
    """
    if options.predictions is not None:
        return _setup_masks(options, options.predictions, world)
    return _setup_model(options, device, world)


def _setup_model(
    options: EvalOptions, device: torch.device, world: DistributedContext
) -> EvalSetup:
    path, chosen_by = find_checkpoint(options.checkpoint)
    loaded = load_checkpoint(path)
    model = restore_model(loaded, path)
    move_model(model, device)
    log.info(f"checkpoint: {path} ({chosen_by}), device: {describe_device(device)}")
    roots, data_chosen_by = _data_roots(options, loaded)
    config = _with_selection(loaded.config, roots, options.sets)
    images = _open_images(options, config, roots, data_chosen_by, world)
    num_trained_on = _num_trained_on(loaded, images)
    if num_trained_on:
        log.warning(
            f"{num_trained_on} of {len(images)} images were trained on; "
            "metrics on them say little about other images"
        )
    options = replace(options, inference=options.inference.with_training_defaults(config))
    return EvalSetup(
        options=options,
        source=_model_predictions(options, config, model),
        model_info=ModelInfo(kind="checkpoint", path=path, model=config.model.name),
        data=_eval_data(options, roots, images, num_trained_on),
        images=images,
        mean_mask=_mean_mask(config, world),
    )


def _setup_masks(options: EvalOptions, path: Path, world: DistributedContext) -> EvalSetup:
    folder = MaskFolder(path)
    log.info(f"masks: {path}")
    named = named_data_roots(options.data)
    if named is None:
        raise UsageError("--predictions needs --data", "give the images and their true masks")
    roots, data_chosen_by = named
    config = _with_selection(Config(), roots, options.sets)
    images = _open_images(options, config, roots, data_chosen_by, world)
    return EvalSetup(
        options=options,
        source=MaskFolderPredictions(folder=folder),
        model_info=ModelInfo(kind="predictions", path=path, model=None),
        data=_eval_data(options, roots, images, 0),
        images=images,
        mean_mask=_mean_mask(config, world),
    )


def _model_predictions(options: EvalOptions, config: Config, model: nn.Module) -> ModelPredictions:
    device = next(model.parameters()).device
    loading: dict[str, Any] = {
        "workers": resolve_workers(options.workers),
        "pin_memory": device.type == "cuda",
    }
    # A run that recalibrates has saved these statistics; measure them only for other runs.
    if options.inference.bn == "recalibrate" and config.train.bn_eval != "recalibrate":
        log.info("measuring batch-norm statistics on training images")
        _recalibrate(model, config, device, loading)
    return ModelPredictions(
        model=model, options=options.inference, batch_size=options.batch_size, loading=loading
    )


def _recalibrate(
    model: nn.Module, config: Config, device: torch.device, loading: dict[str, Any]
) -> None:
    """Measure the batch-norm statistics again, on training images with training transforms."""
    batches = train_batches(
        open_selection(config.data, "train"),
        train_transform(config.data),
        batch_size=config.train.micro_batch_size,
        seed=config.train.seed,
        **loading,
    )
    total = min(NUM_TO_RECALIBRATE, batches.num_images)
    with progress_bar(total=total, desc="measuring") as bar, worker_errors(batches.tracker):
        autocast = autocast_for("fp32", device)
        recalibrate(model, batches, device=device, autocast=autocast, on_batch=bar.update)


def _open_images(
    options: EvalOptions,
    config: Config,
    roots: Roots,
    chosen_by: str,
    world: DistributedContext,
) -> ImageSelection:
    log.info(f"data: {describe_roots(roots)}, by {chosen_by}")
    with world.main_process_first():  # the other processes read its cache
        images = open_selection(config.data, options.split)
    for note in images.notes:
        log.info(note)
    for reason, count in images.skipped.items():
        log.warning(f"{count} left out, {reason}")
    return images if options.limit is None else images.subsample(options.limit)


def _eval_data(
    options: EvalOptions, roots: Roots, images: ImageSelection, num_trained_on: int
) -> EvalData:
    return EvalData(
        roots=roots,
        split=options.split,
        manifest=images.manifest,
        num_damaged=0,
        num_trained_on=num_trained_on,
    )


def _mean_mask(config: Config, world: DistributedContext) -> MeanMask | None:
    """The mean mask of the training images, computed by the main process."""
    mean_mask = None
    with world.main_process_first():
        if world.is_main:
            try:
                images = open_selection(config.data, "train")
                mean_mask = compute_mean_mask(images.subsample(_MAX_MASKS_IN_MEAN))
            except DataError as error:
                log.info(f"no mean-mask baseline, no training images: {error}")
    return world.broadcast(mean_mask)


def _data_roots(options: EvalOptions, loaded: Checkpoint) -> tuple[Roots, str]:
    """The roots of the data to evaluate on, and what chose them."""
    named = named_data_roots(options.data)
    if named is not None:
        return named
    named = named_data_roots(loaded.config.data.root)
    if named is None or not all(root.is_dir() for root in named[0]):
        raise UsageError("the data of the training run is not on this machine", "give --data")
    return named[0], "the training run"


def _with_selection(config: Config, roots: Roots, sets: Sequence[str]) -> Config:
    """The configuration of the run, with these roots and the selection that `sets` change."""
    for assignment in sets:
        key = assignment.partition("=")[0]
        if key.removeprefix("data.") not in _SELECTION_KEYS:
            raise UsageError(
                f"--set {key} does not belong to eval",
                f"it takes data. and one of {', '.join(sorted(_SELECTION_KEYS))}",
            )
    root = tuple(map(str, roots))
    data = replace(config.data, root=root if len(root) > 1 else root[0], weights=None)
    return load_config(None, base=config_to_dict(replace(config, data=data)), sets=sets)


def _num_trained_on(loaded: Checkpoint, images: ImageSelection) -> int:
    """Number of images that the model was trained on."""
    known = loaded.data.get("train_identities")
    if not isinstance(known, torch.Tensor) or known.dtype != torch.int64:
        return 0
    return int(np.isin(images.index.identities.view(np.int64), known.numpy()).sum())
