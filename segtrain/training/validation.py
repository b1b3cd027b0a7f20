"""Judging the network after an epoch, in numbers and on a few pictures."""

from collections.abc import Iterator
from dataclasses import asdict

import numpy as np
from torch import nn

from segtrain.asking import Asking
from segtrain.data.workers import worker_errors
from segtrain.errors import DataError
from segtrain.evaluation.evaluate import evaluate
from segtrain.images import Pixels
from segtrain.models.batch_norm import NUM_TO_RECALIBRATE, evaluation_statistics, recalibrate
from segtrain.models.inference import person_probs_of_picture
from segtrain.pieces import pieces
from segtrain.progress import progress_bar
from segtrain.training.network import average_statistics, unsynchronized
from segtrain.training.setting import Setting, Stage

_NUM_SAMPLES = 6


def measure_statistics(setting: Setting, stage: Stage, model: nn.Module, at_once: int) -> None:
    """Batch norm's running statistics measured anew; they are saved with the weights.

    Raises:
        Stopped: a signal came.
    """
    total = min(NUM_TO_RECALIBRATE, stage.train_set.num_images)
    stage.train_set.set_epoch(stage.train_set.epoch)  # from its beginning
    with (
        progress_bar(total=total, desc="measuring") as bar,
        worker_errors(stage.train_set.watched),
        unsynchronized(model),
    ):
        recalibrate(
            model,
            (piece for batch in stage.train_set for piece in pieces(batch, at_once)),
            device=setting.device,
            autocast=setting.autocast,
            on_batch=bar.update,
        )
    average_statistics(model, setting.world)


def validate(setting: Setting, stage: Stage, model: nn.Module) -> dict[str, float]:
    """Metrics over the validation images by their log names.

    Raises:
        Stopped: a signal came.
    """
    total = stage.val_set.num_images
    with (
        progress_bar(total=total, desc="validating") as bar,
        worker_errors(stage.val_set.watched),
        unsynchronized(model),
    ):
        confusion = evaluate(
            model,
            stage.val_set,
            asking=Asking(short_side=stage.config.data.image_size),
            device=setting.device,
            autocast=setting.autocast,
            bn_eval=stage.config.train.bn_eval,
            on_batch=bar.update,
        )
    setting.world.sum_(confusion.counts)
    return {f"val/{key}": value for key, value in asdict(confusion.compute()).items()}


def samples(
    setting: Setting, stage: Stage, model: nn.Module
) -> Iterator[tuple[Pixels, Pixels, Pixels]]:
    """The same validation pictures every epoch: (image, mask, preds) at original resolution."""
    source = setting.val_source
    with unsynchronized(model), evaluation_statistics(model, stage.config.train.bn_eval):
        for index in np.linspace(0, len(source) - 1, min(_NUM_SAMPLES, len(source))).astype(int):
            try:
                sample = source.sample(int(index))
            except DataError:
                continue  # validation has counted it
            probs = person_probs_of_picture(
                model,
                sample.image,
                Asking(short_side=stage.config.data.image_size),
                setting.device,
                setting.autocast,
            )
            yield sample.image, sample.mask, (probs >= 0.5).byte().cpu().numpy()
