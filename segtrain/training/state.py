"""What changes while a run trains, and its way to the disk and back."""

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from segtrain.checkpoint import Checkpoint, restore_model, save_checkpoint
from segtrain.config import Config
from segtrain.devices import move_model
from segtrain.errors import CheckpointError, ResourceError
from segtrain.models import build_model
from segtrain.models.encoder_unet import EncoderUNet
from segtrain.runs import RunFolder
from segtrain.training.averaging import AveragedModel
from segtrain.training.engine import Tally
from segtrain.training.logs import Row
from segtrain.training.optim import build_optimizer

_PLACE = (
    *("stage", "stage_epoch", "stage_step", "images_drawn", "images_at_once", "lr_factor"),
    *("went_back_in", "best_iou", "best_epoch"),
)


@dataclass(kw_only=True)
class TrainingState:
    """Everything that the next step depends on, but for data and configuration.

    The random numbers are no part of it: each step draws from (seed, global_step).
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: AveragedModel | None
    tally: Tally
    """Counts of the epoch under way."""
    images_at_once: int
    """Where the batch size is auto: what the memory has turned out to hold."""
    stage: int = 0
    """Stages done."""
    stage_epoch: int = 0
    """Whole epochs of this stage."""
    stage_step: int = 0
    """Optimizer steps of this stage."""
    epoch: int = 0
    """Whole epochs of all stages."""
    global_step: int = 0
    """Optimizer steps of all stages."""
    images_drawn: int = 0
    """Pictures of the epoch under way that this process has drawn."""
    lr_factor: float = 1.0
    """Halved each time the training went back."""
    went_back_in: int = -1
    """The epoch in which it last did."""
    best_iou: float = -1.0
    best_epoch: int = 0
    num_processes: int = 1
    """That train together."""
    history: list[Row] = field(default_factory=list)
    """A row for each epoch, as in metrics.jsonl."""

    @property
    def judged_model(self) -> nn.Module:
        """The network that validation looks at and best.pt keeps."""
        return self.average.model if self.average is not None else self.model

    def begin_epoch(self) -> None:
        """Nothing is counted yet, but for steps left out in a row."""
        self.images_drawn = 0
        self.tally = self.tally.of_next_epoch()

    def stage_ious(self) -> list[float]:
        """Validation IoU after each epoch of this stage."""
        rows = [row for row in self.history if row["stage"] == self.stage + 1]
        return [row["val/person_iou"] for row in rows]


def begin(config: Config, device: torch.device, *, use_scaler: bool) -> TrainingState:
    """The state before the first step.

    Raises:
        UserError: pretrained weights cannot be read.
    """
    torch.manual_seed(config.train.seed)
    model = build_model(config.model.name, **config.model.kwargs)
    if isinstance(model, EncoderUNet) and (weights := model.read_pretrained()):
        model.encoder.load_state_dict(weights)
    return _around(model, config, device, use_scaler=use_scaler)


def resume(
    checkpoint: Checkpoint, path: Path, config: Config, device: torch.device, *, use_scaler: bool
) -> TrainingState:
    """The state that a checkpoint holds.

    Args:
        path: named in errors only.
        config: of the stage that the checkpoint is in.

    Raises:
        CheckpointError: it does not fit the network, or an earlier segtrain wrote it.
    """
    training = checkpoint.training
    state = _around(restore_model(checkpoint, path), config, device, use_scaler=use_scaler)
    state.epoch, state.global_step = checkpoint.epoch, checkpoint.global_step
    try:
        for key in _PLACE:
            _expect(type(training[key]) is type(getattr(state, key)), key)
            setattr(state, key, training[key])
        state.history = training["history"]
        _expect(all(type(row["val/person_iou"]) is float for row in state.history), "history")
        _expect([row["epoch"] for row in state.history] == [*range(1, state.epoch + 1)], "history")
        _expect({row["stage"] for row in state.history} <= {*range(1, state.stage + 2)}, "history")
        state.tally = Tally(device, training["tally"])
        _expect(len(state.tally.sums) == len(Tally(device).sums), "tally")
        _load_optimizer(state.optimizer, training["optimizer"])
        if state.average is not None:
            state.average.model.load_state_dict(training["average"])
        # Earlier versions did not write it down.
        state.num_processes = training.get("num_processes", state.num_processes)
        _expect(type(state.num_processes) is int and state.num_processes > 0, "num_processes")
        # A scaler saved while it was disabled has no state: then a fresh one starts.
        if use_scaler and training["scaler"]:
            state.scaler.load_state_dict(training["scaler"])
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} does not hold the training state that this segtrain continues ({error}); "
            "finish it with the version that wrote it or start a new run"
        ) from None
    return state


def next_stage(
    state: TrainingState,
    config: Config,
    best: Checkpoint,
    path: Path,
    device: torch.device,
    *,
    use_scaler: bool,
) -> TrainingState:
    """The best network so far with a fresh optimizer, at the beginning of another stage.

    Args:
        config: of the new stage.
        best: the run's best.pt.
        path: named in errors only.

    Raises:
        CheckpointError: `best` does not fit the network.
    """
    model = restore_model(best, path)
    new = _around(model, config, device, use_scaler=use_scaler)
    new.stage = state.stage + 1
    new.epoch, new.global_step, new.history = state.epoch, state.global_step, state.history
    new.best_iou, new.best_epoch = state.best_iou, state.best_epoch
    new.num_processes = state.num_processes
    return new


def save_last(run: RunFolder, state: TrainingState, config: Config, data: dict[str, Any]) -> None:
    """Write last.pt; what it was before stays as previous.pt.

    Raises:
        ResourceError: the disk is full or not writable; both stay as they were.
        DivergedError: weights or the optimizer's state are not finite; likewise.
    """
    training = {
        **{key: getattr(state, key) for key in _PLACE},
        "num_processes": state.num_processes,
        "history": state.history,
        "tally": state.tally.sums.tolist(),
        "optimizer": state.optimizer.state_dict(),
        "scaler": state.scaler.state_dict(),
        "average": state.average.model.state_dict() if state.average is not None else {},
    }
    checkpoint = _checkpoint(state, state.model, config, data, training)
    save_checkpoint(run.last, checkpoint, keep_as=run.previous)


def save_best(run: RunFolder, state: TrainingState, config: Config, data: dict[str, Any]) -> None:
    """Write best.pt, which holds only what predicting needs. Raises as `save_last` does."""
    save_checkpoint(run.best, _checkpoint(state, state.judged_model, config, data, {}))


def check_space(run: RunFolder) -> None:
    """Make sure that the checkpoints to come will fit on the disk; last.pt says how large they are.

    Raises:
        ResourceError: they will not.
    """
    # Besides last.pt there will be previous.pt, a new one being written, and best.pt.
    size = run.last.stat().st_size
    there = sum(path.stat().st_size for path in (run.previous, run.best) if path.exists())
    needed = max(3 * size - there, size)
    free = shutil.disk_usage(run.path).free
    if free < needed:
        raise ResourceError(
            f"{run.path} needs {needed / 1e6:.1f} MB more for checkpoints and the disk has "
            f"{free / 1e6:.1f}; free some space or choose another --output"
        )


def _around(
    model: nn.Module, config: Config, device: torch.device, *, use_scaler: bool
) -> TrainingState:
    move_model(model, device)
    decay = config.train.ema_decay
    return TrainingState(
        model=model,
        optimizer=build_optimizer(model, config.optim),
        scaler=torch.amp.GradScaler(device.type, enabled=use_scaler),
        average=AveragedModel(model, decay) if decay is not None else None,
        tally=Tally(device),
        images_at_once=config.train.images_at_once,
    )


def _checkpoint(
    state: TrainingState,
    model: nn.Module,
    config: Config,
    data: dict[str, Any],
    training: dict[str, Any],
) -> Checkpoint:
    last_row = state.history[-1] if state.history else {}
    return Checkpoint(
        config=config,
        data=data,
        weights=model.state_dict(),
        epoch=state.epoch,
        global_step=state.global_step,
        metrics={key: value for key, value in last_row.items() if key.startswith("val/")},
        training=training,
    )


def _expect(is_so: bool, what: str) -> None:
    if not is_so:
        raise ValueError(what)


@torch.no_grad()
def _load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """torch takes states of any shape and notices in the first step, if at all."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    fresh = optimizer.state_dict()
    for number, state in saved["state"].items():
        expected = fresh["state"].get(number)
        if expected is not None and state.keys() != expected.keys():
            raise KeyError(f"optimizer's {'/'.join(state)}")
        for key, value in state.items():
            if key != "step" and value.shape != weights[number].shape:
                raise ValueError(f"shape of the optimizer's {key}")
    optimizer.load_state_dict(saved)
    # Fused optimizers go through memory side by side: a state must lie there as its weight does.
    for weight in weights:
        for key, value in optimizer.state.get(weight, {}).items():
            if value.shape == weight.shape:
                optimizer.state[weight][key] = torch.empty_like(weight).copy_(value)
