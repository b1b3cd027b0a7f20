"""The mutable state of a training run, and how it is saved and restored."""

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from segtrain.checkpoint import Checkpoint, restore_model, save_checkpoint
from segtrain.config.schema import Config
from segtrain.errors import CheckpointError, ResourceError
from segtrain.models import build_model
from segtrain.models.encoder_unet import EncoderUNet
from segtrain.runs.folder import RunFolder
from segtrain.runs.read import Row
from segtrain.runtime.devices import move_model
from segtrain.training.ema import AveragedModel
from segtrain.training.optim import build_optimizer
from segtrain.training.step import StepResult, StepStats

_SCALARS = (
    *("stage", "stage_epoch", "stage_step", "samples_seen", "micro_batch_size", "lr_factor"),
    *("rolled_back_epoch", "best_iou", "best_epoch", "num_processes"),
)


@dataclass(kw_only=True)
class TrainingState:
    """Everything that the next step depends on, apart from data and configuration.

    Random number generators are not part of it: each step is seeded from (seed, global_step).
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: AveragedModel | None
    stats: StepStats
    """Statistics of the current epoch."""
    micro_batch_size: int
    """Images per forward and backward pass; with batch size auto, as many as fit in memory."""
    stage: int = 0
    """Completed stages."""
    stage_epoch: int = 0
    """Completed epochs of this stage."""
    stage_step: int = 0
    """Optimizer steps of this stage."""
    epoch: int = 0
    """Completed epochs of all stages."""
    global_step: int = 0
    """Optimizer steps of all stages."""
    samples_seen: int = 0
    """Images of the current epoch that this process has drawn."""
    lr_factor: float = 1.0
    """Factor on the learning rate, halved on each rollback."""
    rolled_back_epoch: int = -1
    """The epoch of the last rollback."""
    best_iou: float = -1.0
    best_epoch: int = 0
    num_processes: int = 1
    """Processes that train together."""
    history: list[Row] = field(default_factory=list)
    """One row per epoch, as in metrics.jsonl."""

    @property
    def eval_model(self) -> nn.Module:
        """The model that is validated and saved in best.pt."""
        return self.ema.model if self.ema is not None else self.model

    def advance(self, result: StepResult, *, num_images: int, seen: int) -> None:
        """Count a step and update the moving average of the weights.

        Args:
            num_images: images in the step of this process.
            seen: images of the epoch that this process has drawn so far, including damaged ones.
        """
        self.global_step += 1
        self.stage_step += 1
        self.samples_seen = seen
        self.stats.add(result)
        self.stats.num_images += num_images
        if self.ema is not None:
            self.ema.update(self.stage_step)

    def begin_epoch(self) -> None:
        """Reset the statistics, except for the count of skipped steps in a row."""
        self.samples_seen = 0
        self.stats = self.stats.next_epoch()

    def stage_ious(self) -> list[float]:
        """Validation IoU after each epoch of this stage."""
        rows = [row for row in self.history if row["stage"] == self.stage + 1]
        return [row["val/person_iou"] for row in rows]


def build_state(config: Config, device: torch.device, *, use_scaler: bool) -> TrainingState:
    """Build the state before the first step.

    Raises:
        UserError: pretrained weights cannot be read.
    """
    torch.manual_seed(config.train.seed)
    model = build_model(config.model.name, **config.model.kwargs)
    if isinstance(model, EncoderUNet) and (weights := model.read_pretrained()):
        model.encoder.load_state_dict(weights)
    return _fresh_state(model, config, device, use_scaler=use_scaler)


def restore_state(
    checkpoint: Checkpoint, path: Path, config: Config, device: torch.device, *, use_scaler: bool
) -> TrainingState:
    """Restore the state from a checkpoint.

    Args:
        path: only named in errors.
        config: the configuration of the checkpoint's stage.

    Raises:
        CheckpointError: the checkpoint does not fit the model, or an earlier segtrain wrote it.
    """
    training = checkpoint.training
    state = _fresh_state(restore_model(checkpoint, path), config, device, use_scaler=use_scaler)
    state.epoch, state.global_step = checkpoint.epoch, checkpoint.global_step
    try:
        for key in _SCALARS:
            _expect(type(training[key]) is type(getattr(state, key)), key)
            setattr(state, key, training[key])
        state.history = training["history"]
        _expect(all(type(row["val/person_iou"]) is float for row in state.history), "history")
        _expect([row["epoch"] for row in state.history] == [*range(1, state.epoch + 1)], "history")
        _expect({row["stage"] for row in state.history} <= {*range(1, state.stage + 2)}, "history")
        state.stats = StepStats(device, training["step_stats"])
        _expect(len(state.stats.sums) == len(StepStats(device).sums), "step_stats")
        _load_optimizer(state.optimizer, training["optimizer"])
        if state.ema is not None:
            state.ema.model.load_state_dict(training["ema"])
        _expect(state.num_processes > 0, "num_processes")
        # A scaler that was saved while disabled has no state: start with a fresh one.
        if use_scaler and training["scaler"]:
            state.scaler.load_state_dict(training["scaler"])
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"{path}: not a training state of this segtrain version ({error})",
            "finish the run with the version that wrote it, or start a new run",
        ) from None
    return state


def next_stage_state(
    state: TrainingState,
    config: Config,
    best: Checkpoint,
    path: Path,
    device: torch.device,
    *,
    use_scaler: bool,
) -> TrainingState:
    """Build the state at the start of the next stage: the best weights and a fresh optimizer.

    Args:
        config: the configuration of the new stage.
        best: the run's best.pt.
        path: only named in errors.

    Raises:
        CheckpointError: `best` does not fit the model.
    """
    model = restore_model(best, path)
    new = _fresh_state(model, config, device, use_scaler=use_scaler)
    new.stage = state.stage + 1
    new.epoch, new.global_step, new.history = state.epoch, state.global_step, state.history
    new.best_iou, new.best_epoch = state.best_iou, state.best_epoch
    new.num_processes = state.num_processes
    return new


def save_last(run: RunFolder, state: TrainingState, config: Config, data: dict[str, Any]) -> None:
    """Write last.pt and keep the previous version as previous.pt.

    Raises:
        ResourceError: the disk is full or not writable; both files stay as they were.
        DivergedError: the weights or the optimizer state are not finite; likewise.
    """
    training = {
        **{key: getattr(state, key) for key in _SCALARS},
        "history": state.history,
        "step_stats": state.stats.sums.tolist(),
        "optimizer": state.optimizer.state_dict(),
        "scaler": state.scaler.state_dict(),
        "ema": state.ema.model.state_dict() if state.ema is not None else {},
    }
    checkpoint = _checkpoint(state, state.model, config, data, training)
    save_checkpoint(run.last, checkpoint, backup=run.previous)


def save_best(run: RunFolder, state: TrainingState, config: Config, data: dict[str, Any]) -> None:
    """Write best.pt, which holds only what prediction needs. Raises the errors of `save_last`."""
    save_checkpoint(run.best, _checkpoint(state, state.eval_model, config, data, {}))


def check_disk_space(run: RunFolder) -> None:
    """Check that the later checkpoints will fit on the disk, estimated from the size of last.pt.

    Raises:
        ResourceError: they will not fit.
    """
    # Besides last.pt there will be previous.pt, the temporary file of a save, and best.pt.
    size = run.last.stat().st_size
    existing = sum(path.stat().st_size for path in (run.previous, run.best) if path.exists())
    needed = max(3 * size - existing, size)
    free = shutil.disk_usage(run.path).free
    if free < needed:
        raise ResourceError(
            f"{run.path} needs {needed / 1e6:.1f} MB more for checkpoints and the disk has "
            f"{free / 1e6:.1f} MB free",
            "free some space or choose another --output",
        )


def _fresh_state(
    model: nn.Module, config: Config, device: torch.device, *, use_scaler: bool
) -> TrainingState:
    move_model(model, device)
    decay = config.train.ema_decay
    return TrainingState(
        model=model,
        optimizer=build_optimizer(model, config.optim),
        scaler=torch.amp.GradScaler(device.type, enabled=use_scaler),
        ema=AveragedModel(model, decay) if decay is not None else None,
        stats=StepStats(device),
        micro_batch_size=config.train.micro_batch_size,
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


def _expect(condition: bool, key: str) -> None:
    if not condition:
        raise ValueError(key)


@torch.no_grad()
def _load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Load an optimizer state and check its shapes; torch does so in the first step, if at all."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    fresh = optimizer.state_dict()
    for number, state in saved["state"].items():
        expected = fresh["state"].get(number)
        if expected is not None and state.keys() != expected.keys():
            raise KeyError(f"optimizer's {'/'.join(state)}")
        for key, value in state.items():
            if key != "step" and value.shape != params[number].shape:
                raise ValueError(f"shape of the optimizer's {key}")
    optimizer.load_state_dict(saved)
    # Fused optimizers walk linearly through memory: a state needs the memory format of its weight.
    for param in params:
        for key, value in optimizer.state.get(param, {}).items():
            if value.shape == param.shape:
                optimizer.state[param][key] = torch.empty_like(param).copy_(value)
