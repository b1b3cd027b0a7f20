"""Validation after an epoch: metrics, and predictions for a few sample images."""

from collections.abc import Iterator
from dataclasses import asdict

import numpy as np
from torch import nn

from segtrain.data.workers import worker_errors
from segtrain.errors import DataError
from segtrain.evaluation.confusion import evaluate_batches
from segtrain.inference.options import InferenceOptions
from segtrain.inference.predict import person_probs_of_image
from segtrain.models.batch_norm import NUM_TO_RECALIBRATE, eval_mode, recalibrate
from segtrain.runtime.progress import progress_bar
from segtrain.training.parallel import average_running_stats, unsynchronized
from segtrain.training.setup import StageData, TrainContext
from segtrain.training.step import micro_batches
from segtrain.types import Image, Mask

_NUM_SAMPLES = 6


def recalibrate_batch_norm(
    ctx: TrainContext, stage: StageData, model: nn.Module, micro_batch_size: int
) -> None:
    """Recompute the running statistics of batch norm; they are saved with the weights.

    Raises:
        Stopped: a signal came.
    """
    total = min(NUM_TO_RECALIBRATE, stage.train_loader.num_images)
    stage.train_loader.set_epoch(stage.train_loader.epoch)  # start at its first image
    with (
        progress_bar(total=total, desc="recalibrating") as bar,
        worker_errors(stage.train_loader.tracker),
        unsynchronized(model),
    ):
        recalibrate(
            model,
            (
                part
                for batch in stage.train_loader
                for part in micro_batches(batch, micro_batch_size)
            ),
            device=ctx.device,
            autocast=ctx.autocast,
            on_batch=bar.update,
        )
    average_running_stats(model, ctx.world)


def validate(ctx: TrainContext, stage: StageData, model: nn.Module) -> dict[str, float]:
    """Compute the metrics over the validation images, by the keys of metrics.jsonl.

    Raises:
        Stopped: a signal came.
    """
    total = stage.val_loader.num_images
    with (
        progress_bar(total=total, desc="validating") as bar,
        worker_errors(stage.val_loader.tracker),
        unsynchronized(model),
    ):
        confusion = evaluate_batches(
            model,
            stage.val_loader,
            options=InferenceOptions(tile=None, size=stage.config.data.image_size),
            device=ctx.device,
            autocast=ctx.autocast,
            bn_eval=stage.config.train.bn_eval,
            on_batch=bar.update,
        )
    ctx.world.all_reduce_sum(confusion.counts)
    return {f"val/{key}": value for key, value in asdict(confusion.compute()).items()}


def predict_samples(
    ctx: TrainContext, stage: StageData, model: nn.Module
) -> Iterator[tuple[Image, Mask, Mask]]:
    """Yield (image, mask, preds) at original resolution for the same few images every epoch."""
    val_images = ctx.val_images
    num_samples = min(_NUM_SAMPLES, len(val_images))
    options = InferenceOptions(tile=None, size=stage.config.data.image_size)
    with unsynchronized(model), eval_mode(model, stage.config.train.bn_eval):
        for index in np.linspace(0, len(val_images) - 1, num_samples).astype(int):
            try:
                sample = val_images.sample(int(index))
            except DataError:
                continue  # validation has counted it
            probs = person_probs_of_image(model, sample.image, options, ctx.device, ctx.autocast)
            yield sample.image, sample.mask, (probs >= 0.5).byte().cpu().numpy()
