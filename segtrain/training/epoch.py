"""One pass over the training images."""

import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from segtrain.config.schema import Config
from segtrain.models.encoder_unet import EncoderUNet
from segtrain.runs.read import Row
from segtrain.runtime.devices import prefetch
from segtrain.runtime.progress import progress_bar
from segtrain.runtime.signals import Stopped, signal_received, stop_requested
from segtrain.training.batch_size import is_out_of_memory
from segtrain.training.optim import SchedulePosition, learning_rate, set_lr
from segtrain.training.parallel import average_running_stats, wrap_ddp
from segtrain.training.setup import StageData, TrainContext
from segtrain.training.state import TrainingState
from segtrain.training.step import EpochStats, FiniteBatchNormGuard, StepStats, train_step

# Reading the step statistics waits for the GPU, so it is done every few steps. The interval is in
# steps, not in seconds, so that two equal runs check at the same steps.
_CHECK_EVERY = {"cuda": 10, "cpu": 1}
# Skipped steps in a row that count as divergence. One or two do happen, and fp16 finds its loss
# scale by skipping steps.
_DIVERGED_AFTER, _DIVERGED_AFTER_FP16 = 3, 20
_SECONDS = {"s": 1, "m": 60, "h": 3600}


class Diverged(Exception):  # noqa: N818, whether it is an error depends on how often it happened
    """Too many steps in a row had no finite loss or gradient."""

    def __init__(self, message: str, *, may_roll_back: bool) -> None:
        super().__init__(message)
        self.may_roll_back = may_roll_back


class OutOfMemory(Exception):  # noqa: N818, it becomes a ResourceError with advice
    """A step did not fit into memory and was not taken."""


def train_one_epoch(
    ctx: TrainContext, stage: StageData, state: TrainingState, *, save: Callable[[], None]
) -> Row:
    """Take the remaining steps of the current epoch.

    Args:
        save: writes the state; called between two steps.

    Returns:
        The metrics of the epoch, by the keys of metrics.jsonl.

    Raises:
        Stopped: a process received a signal; the state is that after the last step.
        Diverged: the weights are those before the skipped steps, and the running statistics of
            batch norm are finite.
        OutOfMemory: the step was not taken, and its memory is released.
    """
    config, device, world = stage.config, ctx.device, ctx.world
    if isinstance(state.model, EncoderUNet):
        state.model.freeze_encoder(state.stage_epoch < config.train.freeze_encoder_epochs)
    state.model.train()
    network = wrap_ddp(state.model, world)
    stage.train_loader.set_epoch(state.epoch, samples_seen=state.samples_seen)
    num_steps, ious = config.train.epochs * num_steps_per_epoch(stage), state.stage_ious()
    bn_guard = FiniteBatchNormGuard(*_models(state))
    # After a mid-epoch resume, time only this part.
    state.stats.num_images, state.stats.seconds_waited = 0, 0.0
    started = last_save = time.perf_counter()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    if world.any_rank(stop_requested()):
        raise Stopped(signal_received())
    with (
        _progress_bar(ctx, stage, state) as bar,
        bn_guard.restored_on_exit(),
        memory_errors(),
    ):
        for batch in _timed(prefetch(stage.train_loader, device), state.stats):
            seed_step(config.train.seed, state.global_step, world.rank)
            set_lr(state.optimizer, _learning_rate(config, state, num_steps, ious))
            result = train_step(
                network,
                batch,
                state.optimizer,
                state.scaler,
                stage.loss_fn,
                autocast=ctx.autocast,
                micro_batch_size=state.micro_batch_size,
                clip_norm=config.optim.clip_norm,
                all_reduce=world.all_reduce_sum,
                graph=stage.graph,
            )
            state.advance(result, num_images=len(batch["image"]), seen=batch.get("samples_seen", 0))
            # All processes stop at the same step.
            stopping = world.any_rank(stop_requested())
            checking = state.stage_step % _CHECK_EVERY[device.type] == 0
            saving = not stopping and _save_is_due(config.train.save_every, last_save)
            if stopping or checking or saving:
                stats = _check_stats(ctx, state, bn_guard)  # waits for the device
                bar.set_postfix(_progress_postfix(stats, state, device, started), refresh=False)
            if stopping:
                raise Stopped(signal_received())
            if saving:
                save()
                last_save = time.perf_counter()
            bar.update(len(batch["image"]))
    _check_stats(ctx, state, bn_guard)
    for model in _models(state):
        average_running_stats(model, world)
    return _epoch_metrics(ctx, state, time.perf_counter() - started)


def num_steps_per_epoch(stage: StageData) -> int:
    """Number of optimizer steps in a full epoch."""
    return -(-stage.train_loader.num_images // stage.config.train.effective_batch_size)


def seed_step(seed: int, global_step: int, rank: int) -> None:
    """Seed torch's generators for one step: dropout depends on (seed, step, rank) alone."""
    state = np.random.SeedSequence([seed, global_step, rank]).generate_state(1, np.uint64)
    torch.manual_seed(int(state[0] >> 1))


def _learning_rate(
    config: Config, state: TrainingState, num_steps: int, ious: Sequence[float]
) -> float:
    position = SchedulePosition(
        epoch=state.stage_epoch, step=state.stage_step, num_steps=num_steps, ious=ious
    )
    return learning_rate(config.optim, position) * state.lr_factor


def _timed(batches: Iterable[Mapping[str, Any]], stats: StepStats) -> Iterator[Mapping[str, Any]]:
    """Yield `batches`, adding the time spent waiting for each to `stats`."""
    since = time.perf_counter()
    for batch in batches:
        stats.seconds_waited += time.perf_counter() - since
        yield batch
        since = time.perf_counter()


def _models(state: TrainingState) -> list[nn.Module]:
    return [state.model, *([state.ema.model] if state.ema is not None else [])]


def _check_stats(
    ctx: TrainContext, state: TrainingState, bn_guard: FiniteBatchNormGuard
) -> EpochStats:
    """Read the step statistics; waits for the device.

    Raises:
        Diverged: too many steps in a row were skipped.
    """
    # Needed even without skipped steps: if all pixels are ignored, the gradient is finite anyway.
    bn_guard.check()
    stats = state.stats.read()
    limit = _DIVERGED_AFTER_FP16 if ctx.use_scaler else _DIVERGED_AFTER
    if stats.skipped_in_a_row >= limit:
        raise Diverged(
            f"{stats.skipped_in_a_row} steps in a row had no finite loss and gradient",
            may_roll_back=not ctx.use_scaler,
        )
    return stats


def _save_is_due(save_every: str | None, last_save: float) -> bool:
    if save_every is None:
        return False
    return time.perf_counter() - last_save >= int(save_every[:-1]) * _SECONDS[save_every[-1]]


@contextmanager
def memory_errors() -> Iterator[None]:
    """Turn every out-of-memory error into OutOfMemory."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        # The frames of the traceback hold the activations of the step. Without clearing them, there
        # would be no memory to try fewer images.
        traceback.clear_frames(error.__traceback__)
        raise OutOfMemory(str(error)) from error


def _progress_bar(ctx: TrainContext, stage: StageData, state: TrainingState) -> "tqdm[object]":
    stages = f"stage {state.stage + 1}, " if ctx.config.stages else ""
    return progress_bar(
        total=stage.train_loader.num_images,
        initial=state.samples_seen,
        desc=f"{stages}epoch {state.stage_epoch + 1}/{stage.config.train.epochs}",
    )


def _progress_postfix(
    stats: EpochStats, state: TrainingState, device: torch.device, started: float
) -> dict[str, str]:
    waited = state.stats.seconds_waited / (time.perf_counter() - started)
    shown = {
        "loss": f"{stats.loss:.3f}",
        "person_iou": f"{stats.person_iou:.3f}",
        "wait": f"{waited:.0%}",
    }
    if device.type == "cuda":
        shown["memory"] = f"{torch.cuda.max_memory_reserved(device) / 2**30:.1f}G"
    if stats.skipped:
        shown["skipped"] = str(stats.skipped)
    return shown


def _epoch_metrics(ctx: TrainContext, state: TrainingState, seconds: float) -> Row:
    """The training metrics of the epoch, over all processes."""
    stats = state.stats.read()
    row: Row = {
        "lr": state.optimizer.param_groups[0]["lr"],
        "train/loss": stats.loss,
        "train/person_iou": stats.person_iou,
        "skipped_steps": stats.skipped,
        "images_per_second": round(state.stats.num_images * ctx.world.size / seconds, 2),
        "data_wait": round(state.stats.seconds_waited / seconds, 4),
    }
    if ctx.device.type == "cuda":
        row["gpu_memory"] = torch.cuda.max_memory_reserved(ctx.device)
    return row
