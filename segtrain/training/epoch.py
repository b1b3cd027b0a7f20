"""One pass over the training pictures: its steps, what is shown of them, and when it must end."""

import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from segtrain.config import Config
from segtrain.models.encoder_unet import EncoderUNet
from segtrain.progress import progress_bar
from segtrain.stopping import Stopped, requested, signal_received
from segtrain.training.averaging import StatisticsGuard
from segtrain.training.engine import Found, training_steps
from segtrain.training.logs import Row
from segtrain.training.memory import is_out_of_memory
from segtrain.training.network import average_statistics, in_parallel
from segtrain.training.optim import Place, learning_rate
from segtrain.training.setting import Setting, Stage
from segtrain.training.state import TrainingState

# Looking at what the steps found waits for a GPU, so it is done now and then. By steps and not by
# seconds, so that two equal runs look at the same moments.
_STEPS_A_LOOK = {"cuda": 10, "cpu": 1}
# A step or two without a finite gradient happen. fp16 looks for its scale by such steps.
_TOO_MANY, _TOO_MANY_FP16 = 3, 20
_SECONDS = {"s": 1, "m": 60, "h": 3600}


class Diverging(Exception):  # noqa: N818, whether it is an error depends on how often it came
    """Too many steps in a row had no finite loss or gradient."""

    def __init__(self, what: str, *, may_go_back: bool) -> None:
        super().__init__(what)
        self.may_go_back = may_go_back


class NoMemory(Exception):  # noqa: N818, it becomes a ResourceError with advice
    """A step did not fit into the memory; it was not taken."""


def train_one_epoch(
    setting: Setting, stage: Stage, state: TrainingState, *, save: Callable[[], None]
) -> Row:
    """Take the steps of the epoch under way that are left.

    Args:
        save: writes the state; called between two steps.

    Returns:
        What there is to tell of it, by the keys of metrics.jsonl.

    Raises:
        Stopped: a signal came to one of the processes; the state is that after the last step.
        Diverging: the state is that before the bad steps, but for batch norm's statistics, which
            are finite.
        NoMemory: likewise; nothing holds on to the memory that the step has taken.
    """
    config, device, world = stage.config, setting.device, setting.world
    if isinstance(state.model, EncoderUNet):
        state.model.freeze_encoder(state.stage_epoch < config.train.freeze_encoder_epochs)
    state.model.train()
    network = in_parallel(state.model, world)
    stage.train_set.set_epoch(state.epoch, num_done=state.images_drawn)
    guard = StatisticsGuard(*_averaged_too(state))
    num_steps, ious = config.train.epochs * len_of_epoch(stage), state.stage_ious()
    # Of this epoch there may have been a part before, whose seconds nobody counts here.
    state.tally.num_images, state.tally.seconds_waited = 0, 0.0
    started = last_save = time.perf_counter()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    steps = training_steps(
        network,
        stage.train_set,
        state.tally,
        loss_fn=stage.loss_fn,
        optimizer=state.optimizer,
        scaler=state.scaler,
        autocast=setting.autocast,
        device=device,
        before_step=lambda: _prepare_step(config, setting, state, num_steps, ious),
        images_at_once=state.images_at_once,
        clip_norm=config.optim.clip_norm,
        sum_of_all=world.sum_,
        graph=stage.graph,
    )
    if world.any(requested()):
        raise Stopped(signal_received())
    with (
        _training_bar(setting, stage, state) as bar,
        guard.leaving_good_ones(),
        memory_errors(),
    ):
        for step in steps:
            state.global_step += 1
            state.stage_step += 1
            state.images_drawn = step.num_drawn
            if state.average is not None:
                state.average.update(state.stage_step)
            if world.any(requested()):
                _look(setting, state, guard)
                raise Stopped(signal_received())
            if state.stage_step % _STEPS_A_LOOK[device.type] == 0:
                found = _look(setting, state, guard)
                bar.set_postfix(_shown(found, state, device, started), refresh=False)
            if _is_due(config.train.save_every, last_save):
                _look(setting, state, guard)
                save()
                last_save = time.perf_counter()
            bar.update(step.num_images)
    _look(setting, state, guard)
    for model in _averaged_too(state):
        average_statistics(model, world)
    return _told(setting, state, time.perf_counter() - started)


def len_of_epoch(stage: Stage) -> int:
    """Optimizer steps of a whole epoch."""
    return -(-stage.train_set.num_images // stage.config.train.images_a_step)


def _prepare_step(
    config: Config,
    setting: Setting,
    state: TrainingState,
    num_steps: int,
    ious: Sequence[float],
) -> float:
    """Sets the random numbers of one step and returns its learning rate.

    Args:
        num_steps: of the whole stage.
        ious: of validation after each epoch of it.
    """
    key = [config.train.seed, state.global_step, setting.world.rank]
    torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1))
    place = Place(
        epoch=state.stage_epoch,
        step=state.stage_step,
        num_steps=num_steps,
        ious=ious,
    )
    return learning_rate(config.optim, place) * state.lr_factor


def _averaged_too(state: TrainingState) -> list[nn.Module]:
    return [state.model, *([state.average.model] if state.average is not None else [])]


def _look(setting: Setting, state: TrainingState, guard: StatisticsGuard) -> Found:
    """Read what the steps found.

    Raises:
        Diverging: too many of them in a row were left out.
    """
    # Also where all steps were good: a batch without a pixel that counts has no bad gradient.
    guard.look()
    found = state.tally.read()
    limit = _TOO_MANY_FP16 if setting.use_scaler else _TOO_MANY
    if found.skipped_in_a_row >= limit:
        raise Diverging(
            f"{found.skipped_in_a_row} steps in a row had no finite loss and gradient",
            may_go_back=not setting.use_scaler,
        )
    return found


def _is_due(save_every: str | None, last_save: float) -> bool:
    if save_every is None:
        return False
    return time.perf_counter() - last_save >= int(save_every[:-1]) * _SECONDS[save_every[-1]]


@contextmanager
def memory_errors() -> Iterator[None]:
    """Make NoMemory of whatever says that there is none left."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        # The frames that the error has come through hold the step's activations. They would be in
        # the way when a smaller number of pictures is tried.
        traceback.clear_frames(error.__traceback__)
        raise NoMemory(str(error)) from error


def _training_bar(setting: Setting, stage: Stage, state: TrainingState) -> "tqdm[object]":
    stages = f"stage {state.stage + 1}, " if setting.config.stages else ""
    return progress_bar(
        total=stage.train_set.num_images,
        initial=state.images_drawn,
        desc=f"{stages}epoch {state.stage_epoch + 1}/{stage.config.train.epochs}",
        # The loop does: several processes must agree on where they stop, and before anything is
        # saved the last steps are looked at.
        listens=False,
    )


def _shown(
    found: Found, state: TrainingState, device: torch.device, started: float
) -> dict[str, str]:
    waited = state.tally.seconds_waited / (time.perf_counter() - started)
    shown = {
        "loss": f"{found.loss:.3f}",
        "person_iou": f"{found.person_iou:.3f}",
        "wait": f"{waited:.0%}",
    }
    if device.type == "cuda":
        shown["memory"] = f"{torch.cuda.max_memory_reserved(device) / 2**30:.1f}G"
    if found.skipped:
        shown["skipped"] = str(found.skipped)
    return shown


def _told(setting: Setting, state: TrainingState, seconds: float) -> Row:
    """The epoch's row, of all processes together."""
    tally, device = state.tally, setting.device
    found = tally.read()
    row: Row = {
        "lr": state.optimizer.param_groups[0]["lr"],
        "train/loss": found.loss,
        "train/person_iou": found.person_iou,
        "skipped_steps": found.skipped,
        "images_per_second": round(tally.num_images * setting.world.size / seconds, 2),
        "data_wait": round(tally.seconds_waited / seconds, 4),
    }
    if device.type == "cuda":
        row["gpu_memory"] = torch.cuda.max_memory_reserved(device)
    return row
