"""The epoch loop: train, validate, save, tell."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from segtrain.checkpoint import Checkpoint, restore_model, save_checkpoint
from segtrain.config import BnEval, Config
from segtrain.data.loading import (
    Batches,
    eval_batches,
    resolve_workers,
    train_batches,
    worker_errors,
)
from segtrain.data.sample import Source
from segtrain.data.transforms import TrainTransform
from segtrain.devices import (
    Autocast,
    autocast_for,
    describe_device,
    move_model,
    resolve_device,
    resolve_precision,
)
from segtrain.errors import DataError, DivergedError
from segtrain.evaluation.evaluate import evaluate
from segtrain.images import Pixels
from segtrain.models import build_model
from segtrain.models.batch_norm import (
    NUM_TO_RECALIBRATE,
    evaluation_statistics,
    recalibrate,
)
from segtrain.models.encoder_unet import EncoderUNet
from segtrain.models.inference import person_probs_of_picture
from segtrain.progress import progress_bar
from segtrain.runs import point_latest_at
from segtrain.training.engine import train_one_epoch
from segtrain.training.logs import (
    Row,
    RunLog,
    read_history,
    write_curves,
    write_history,
    write_samples,
)
from segtrain.training.losses import cross_entropy
from segtrain.training.optim import build_optimizer, learning_rate
from segtrain.training.start import Start

_NUM_SAMPLES = 6


@dataclass
class _State:
    """What changes from epoch to epoch; saved in `last.pt`."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    device: torch.device
    epoch: int = 0
    global_step: int = 0
    best_iou: float = -1.0
    best_epoch: int = 0


@dataclass(frozen=True)
class FitResult:
    """How a run ended."""

    best_iou: float
    best_epoch: int
    num_epochs: int


def fit(start: Start, log: RunLog) -> FitResult:
    """Train until `start.config.train.epochs` epochs are done.

    After each epoch the validation images are judged at original resolution, and last.pt, best.pt
    (by global person IoU), metrics.jsonl, curves.png and a sheet of samples are written.

    Raises:
        UserError: bad data, no memory, a full disk, or a loss that is no longer finite
            (DivergedError); checkpoints written before stay as they are.
    """
    config, run = start.config, start.run
    bn_eval = config.train.bn_eval
    device = resolve_device(config.train.device)
    precision = resolve_precision(config.train.precision, device)
    autocast = autocast_for(precision, device)
    log.line(f"device: {describe_device(device)}, precision {precision}")

    train_set, val_set = _batches(start, device)
    log.line(f"images: {train_set.num_images} for training, {val_set.num_images} for validation")
    for split, source in (("training", start.train_source), ("validation", start.val_source)):
        for note in source.notes:
            log.line(f"{split}: {note}")
        for reason, count in source.skipped.items():
            log.warn(f"{split}: {count} left out, {reason}")

    state = _initial_state(config, device, precision == "fp16", start.resumed, run.last)
    num_parameters = sum(p.numel() for p in state.model.parameters())
    log.line(f"model: {config.model.name}, {num_parameters:,} parameters")
    history = read_history(run.metrics, until_epoch=state.epoch)

    while state.epoch < config.train.epochs:
        started = time.perf_counter()
        with worker_errors():
            loss = _train_epoch(config, state, train_set, autocast)
            train_seconds = time.perf_counter() - started
            if bn_eval == "recalibrate":
                _recalibrate(state.model, train_set, autocast, device)
            metrics = _validate(state.model, val_set, autocast, device, bn_eval)
        state.epoch += 1
        _save(start, state, metrics)

        row = {
            "epoch": state.epoch,
            "global_step": state.global_step,
            "lr": state.optimizer.param_groups[0]["lr"],
            "train/loss": loss,
            **metrics,
            "seconds": round(time.perf_counter() - started, 3),
            "images_per_second": round(train_set.num_images / train_seconds, 2),
        }
        history.append(row)
        write_history(run.metrics, history)
        write_curves(run.curves, history)
        with evaluation_statistics(state.model, bn_eval):
            samples = list(_sample_rows(state.model, start.val_source, config, autocast, device))
        if samples:
            write_samples(run.samples(state.epoch), samples)
        log.line(_epoch_line(row, config.train.epochs, state.best_epoch == state.epoch))
    for split, batches in (("training", train_set), ("validation", val_set)):
        if batches.damaged:
            first = min(batches.damaged)
            log.warn(f"{split}: {len(batches.damaged)} pictures left out, first: {first}")
    return FitResult(state.best_iou, state.best_epoch, state.epoch)


def _batches(start: Start, device: torch.device) -> tuple[Batches, Batches]:
    config = start.config
    workers = resolve_workers(config.data.workers)
    pin_memory = device.type == "cuda"
    train_set = train_batches(
        start.train_source,
        TrainTransform(config.data.image_size, config.data.augment, config.data.scale),
        lengths=start.train_source.lengths,
        weights=config.data.weights,
        batch_size=config.train.images_a_step,
        workers=workers,
        seed=config.train.seed,
        pin_memory=pin_memory,
    )
    val_set = eval_batches(
        start.val_source,
        image_size=config.data.image_size,
        # By its own statistics a picture is judged alone.
        batch_size=1 if config.train.bn_eval == "batch" else config.train.images_at_once,
        workers=workers,
        pin_memory=pin_memory,
    )
    return train_set, val_set


def _initial_state(
    config: Config, device: torch.device, use_scaler: bool, resumed: Checkpoint | None, path: Path
) -> _State:
    torch.manual_seed(config.train.seed)
    if resumed is None:
        model = build_model(config.model.name, **config.model.kwargs)
        if isinstance(model, EncoderUNet) and (weights := model.read_pretrained()):
            model.encoder.load_state_dict(weights)
    else:
        model = restore_model(resumed, path)
    move_model(model, device)
    state = _State(
        model=model,
        optimizer=build_optimizer(model, config.optim),
        scaler=torch.amp.GradScaler(device.type, enabled=use_scaler),
        device=device,
    )
    if resumed is not None:
        training = resumed.training
        state.optimizer.load_state_dict(training["optimizer"])
        # A scaler saved while it was disabled has no state: then a fresh one starts.
        if use_scaler and training["scaler"]:
            state.scaler.load_state_dict(training["scaler"])
        state.epoch, state.global_step = resumed.epoch, resumed.global_step
        state.best_iou, state.best_epoch = training["best_iou"], training["best_epoch"]
        _set_random_states(training["random"], device)
    return state


def _train_epoch(config: Config, state: _State, train_set: Batches, autocast: Autocast) -> float:
    """One epoch with its progress bar; returns the mean loss."""
    train_set.set_epoch(state.epoch)
    if isinstance(state.model, EncoderUNet):
        state.model.freeze_encoder(state.epoch < config.train.freeze_encoder_epochs)
    with _training_bar(config, state, train_set.num_images) as on_step:
        loss, state.global_step = train_one_epoch(
            state.model,
            train_set,
            loss_fn=cross_entropy,
            optimizer=state.optimizer,
            scaler=state.scaler,
            autocast=autocast,
            device=state.device,
            learning_rate=lambda step: learning_rate(
                config.optim, epoch=state.epoch, global_step=step
            ),
            global_step=state.global_step,
            on_step=on_step,
        )
    return _finite(loss, state.epoch)


def _recalibrate(
    model: nn.Module, train_set: Batches, autocast: Autocast, device: torch.device
) -> None:
    """Batch norm's running statistics measured anew; they are saved with the weights."""
    total = min(NUM_TO_RECALIBRATE, train_set.num_images)
    with progress_bar(total=total, desc="measuring") as bar:
        recalibrate(model, train_set, device=device, autocast=autocast, on_batch=bar.update)


def _validate(
    model: nn.Module, val_set: Batches, autocast: Autocast, device: torch.device, bn_eval: BnEval
) -> dict[str, float]:
    """Metrics over the validation images by their log names."""
    with progress_bar(total=val_set.num_images, desc="validating") as bar:
        confusion = evaluate(
            model,
            val_set,
            device=device,
            autocast=autocast,
            bn_eval=bn_eval,
            on_batch=bar.update,
        )
    return {f"val/{key}": value for key, value in asdict(confusion.compute()).items()}


def _save(start: Start, state: _State, metrics: dict[str, float]) -> None:
    """Write last.pt, and best.pt where this epoch is the best so far."""
    if metrics["val/person_iou"] > state.best_iou:
        state.best_iou, state.best_epoch = metrics["val/person_iou"], state.epoch
        save_checkpoint(start.run.best, _checkpoint(start, state, metrics, resumable=False))
    save_checkpoint(start.run.last, _checkpoint(start, state, metrics, resumable=True))
    point_latest_at(start.run)


@contextmanager
def _training_bar(config: Config, state: _State, num_images: int) -> Iterator[Any]:
    """Yields the `on_step` of the engine; the loss is read only when the bar is drawn anew."""
    desc = f"epoch {state.epoch + 1}/{config.train.epochs}"
    with progress_bar(total=num_images, desc=desc) as bar:

        def on_step(num: int, loss: Tensor) -> None:
            if bar.update(num):
                bar.set_postfix(loss=f"{_finite(loss, state.epoch):.3f}", refresh=False)

        yield on_step


def _finite(loss: Tensor, epoch: int) -> float:
    value = loss.item()
    if not math.isfinite(value):
        raise DivergedError(
            f"the loss became {value} in epoch {epoch + 1}; earlier checkpoints are kept; "
            "--resume with a lower --lr or --precision fp32"
        )
    return value


def _checkpoint(
    start: Start, state: _State, metrics: dict[str, float], *, resumable: bool
) -> Checkpoint:
    training: dict[str, Any] = {}
    if resumable:
        training = {
            "optimizer": state.optimizer.state_dict(),
            "scaler": state.scaler.state_dict(),
            "random": _random_states(state.device),
            "best_iou": state.best_iou,
            "best_epoch": state.best_epoch,
        }
    return Checkpoint(
        config=start.config,
        data={
            "train_manifest": start.train_source.manifest,
            "val_manifest": start.val_source.manifest,
            # torch's unsigned 64 bits can do little.
            "train_identities": torch.from_numpy(
                start.train_source.catalog.identities.view(np.int64).copy()
            ),
        },
        weights=state.model.state_dict(),
        epoch=state.epoch,
        global_step=state.global_step,
        metrics=metrics,
        training=training,
    )


def _random_states(device: torch.device) -> dict[str, Tensor]:
    """The states that dropout draws from; everything else is drawn from (seed, epoch, index)."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _set_random_states(states: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


def _sample_rows(
    model: nn.Module, source: Source, config: Config, autocast: Autocast, device: torch.device
) -> Iterator[tuple[Pixels, Pixels, Pixels]]:
    """The same validation pictures every epoch: (image, mask, preds) at original resolution."""
    for index in np.linspace(0, len(source) - 1, min(_NUM_SAMPLES, len(source))).astype(int):
        try:
            sample = source.sample(int(index))
        except DataError:
            continue  # validation has counted it
        short_side = config.data.image_size
        probs = person_probs_of_picture(model, sample.image, short_side, device, autocast)
        yield sample.image, sample.mask, (probs >= 0.5).to(torch.uint8).cpu().numpy()


def _epoch_line(row: Row, num_epochs: int, improved: bool) -> str:
    return (
        f"epoch {row['epoch']}/{num_epochs}  loss {row['train/loss']:.4f}  "
        f"person IoU {row['val/person_iou']:.4f}{' (best)' if improved else ''}  "
        f"{row['images_per_second']:.1f} images/s  {row['seconds']:.0f} s"
    )
