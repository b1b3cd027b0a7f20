"""The training loop over epochs and stages: train, validate, save and report."""

import logging
import time
from dataclasses import dataclass
from functools import partial

import numpy as np

from segtrain.checkpoint import load_checkpoint
from segtrain.config.resolve import stage_configs
from segtrain.config.schema import Config
from segtrain.data.workers import worker_errors
from segtrain.errors import CheckpointError, DivergedError
from segtrain.runs.folder import point_latest_at
from segtrain.runs.read import Row
from segtrain.runtime.signals import Stopped
from segtrain.training.batch_size import choose_micro_batch_size, shrink_micro_batch_size
from segtrain.training.epoch import Diverged, OutOfMemory, memory_errors, train_one_epoch
from segtrain.training.parallel import prepare_model
from segtrain.training.reporting import RunOutputs
from segtrain.training.resume import ResumePoint
from segtrain.training.setup import StageData, TrainContext, open_stage
from segtrain.training.state import (
    TrainingState,
    build_state,
    check_disk_space,
    next_stage_state,
    restore_state,
    save_best,
    save_last,
)
from segtrain.training.validation import predict_samples, recalibrate_batch_norm, validate

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FitResult:
    """Result of a run; `history` has one row per epoch, as in metrics.jsonl."""

    best_iou: float
    best_epoch: int
    num_epochs: int
    history: list[Row]


def fit(ctx: TrainContext) -> FitResult:
    """Train until all epochs of all stages are done.

    Each epoch ends with validation at original resolution and writes last.pt, best.pt (selected by
    global person IoU), metrics.jsonl, curves.png and a contact sheet of samples.

    Raises:
        UserError: bad data, out of memory, a full disk, or divergence (DivergedError); the
            checkpoints written before stay as they are.
        Stopped: a signal was received; last.pt holds the state after the last step.
    """
    configs = stage_configs(ctx.config)
    state = _first_state(ctx, configs)
    stage = None
    tensorboard = ctx.config.train.tensorboard and ctx.world.is_main
    with RunOutputs(ctx.run, tensorboard=tensorboard) as outputs:
        if ctx.resume_point is not None and ctx.world.is_main:
            _rewrite_outputs(ctx, configs[state.stage], state, outputs)
        while not _is_done(configs[state.stage], state) or state.stage + 1 < len(configs):
            if _is_done(configs[state.stage], state):
                state = _begin_next_stage(ctx, configs, state)
            if stage is None or stage.number != state.stage:
                if stage is not None:
                    _warn_of_damaged_images(stage)
                stage = open_stage(ctx, state.stage, configs[state.stage], state.micro_batch_size)
            try:
                row = _train_and_validate(ctx, stage, state)
            except Diverged as diverged:
                state = _roll_back(ctx, stage.config, state, diverged)
                continue
            except OutOfMemory:
                _shrink_micro_batches(ctx, stage.config, state)
                _warn_of_damaged_images(stage)
                stage = None  # its validation batches are too large as well
                continue
            _finish_epoch(ctx, stage, state, row)
            if ctx.world.is_main:
                outputs.write(state.history, list(predict_samples(ctx, stage, state.eval_model)))
            num_epochs = state.epoch - state.stage_epoch + stage.config.train.epochs
            num_later = sum(config.train.epochs for config in configs[state.stage + 1 :])
            outputs.report(state.history, num_epochs=num_epochs + num_later)
    if stage is not None:
        _warn_of_damaged_images(stage)
    return FitResult(state.best_iou, state.best_epoch, state.epoch, state.history)


def _first_state(ctx: TrainContext, configs: list[Config]) -> TrainingState:
    """Return the resumed state, or a new one, after saving it as last.pt.

    A full or read-only disk is thereby found before the first step, and there is always a state to
    roll back to.
    """
    if ctx.resume_point is not None:
        state = _resumed_state(ctx, configs, ctx.resume_point)
        if ctx.resume_point.path != ctx.run.last:
            _save_last(ctx, state)
    else:
        state = build_state(configs[0], ctx.device, use_scaler=ctx.use_scaler)
        state.num_processes = ctx.world.size
        state.micro_batch_size = choose_micro_batch_size(ctx, configs[0], state.model)
        if ctx.world.is_main:
            save_last(ctx.run, state, ctx.config, ctx.data)
    if ctx.world.is_main:
        check_disk_space(ctx.run)
    _prepare_model(ctx, state)
    num_parameters = sum(p.numel() for p in state.model.parameters())
    log.info(f"model: {ctx.config.model.name}, {num_parameters:,} parameters")
    return state


def _resumed_state(ctx: TrainContext, configs: list[Config], point: ResumePoint) -> TrainingState:
    training = point.checkpoint.training
    number = training.get("stage")
    if type(number) is not int or not 0 <= number < len(configs):
        raise CheckpointError(
            f"{point.path} is in a stage that its configuration does not have", "start a new run"
        )
    config = configs[number]
    state = restore_state(
        point.checkpoint, point.path, config, ctx.device, use_scaler=ctx.use_scaler
    )
    # Each process has drawn an equal number of images of the epoch.
    state.samples_seen = state.samples_seen * state.num_processes // ctx.world.size
    state.num_processes = ctx.world.size
    val_manifest = point.checkpoint.data.get("val_manifest")
    if val_manifest not in {None, ctx.val_images.manifest} and not _is_done(config, state):
        log.warning("the validation images have changed: the search for the best IoU starts over")
        state.best_iou = -1.0
    if ctx.use_scaler and not training["scaler"]:
        log.warning("the run did not use fp16 before: the gradient scaler starts over")
    before = stage_configs(point.checkpoint.config)
    was_auto = before[min(number, len(before) - 1)].train.batch_size == "auto"
    if config.train.batch_size != "auto" or not was_auto:
        state.micro_batch_size = choose_micro_batch_size(ctx, config, state.model)
    return state


def _begin_next_stage(
    ctx: TrainContext, configs: list[Config], state: TrainingState
) -> TrainingState:
    log.info(
        f"stage {state.stage + 2} of {len(configs)}: starting from the weights of epoch "
        f"{state.best_epoch}, the best so far"
    )
    config, best = configs[state.stage + 1], ctx.run.best
    new = next_stage_state(
        state,
        config,
        ctx.world.read_on_main(partial(load_checkpoint, best)),
        best,
        ctx.device,
        use_scaler=ctx.use_scaler,
    )
    new.micro_batch_size = choose_micro_batch_size(ctx, config, new.model)
    # A stage that diverges must not roll back into the stage before.
    _save_last(ctx, new)
    _prepare_model(ctx, new)
    return new


def _roll_back(
    ctx: TrainContext, config: Config, state: TrainingState, diverged: Diverged
) -> TrainingState:
    """Restore the last saved state with half the learning rate.

    Raises:
        DivergedError: the run has already been rolled back in this epoch, or must not be.
    """
    if not diverged.may_roll_back or state.rolled_back_epoch == state.epoch:
        raise DivergedError(
            f"epoch {state.epoch + 1} diverged: {diverged}",
            "the checkpoints are kept; --resume with a lower --lr or --precision fp32",
        )
    new = restore_state(
        ctx.world.read_on_main(partial(load_checkpoint, ctx.run.last)),
        ctx.run.last,
        config,
        ctx.device,
        use_scaler=ctx.use_scaler,
    )
    new.micro_batch_size = state.micro_batch_size
    new.lr_factor, new.rolled_back_epoch = state.lr_factor / 2, state.epoch
    new.stats.reset_in_a_row()
    _prepare_model(ctx, new)
    log.warning(
        f"{diverged}: back to the state after step {new.global_step}, with the learning rate "
        f"times {new.lr_factor:g}"
    )
    return new


def _shrink_micro_batches(ctx: TrainContext, config: Config, state: TrainingState) -> None:
    """Save the state before the step that ran out of memory, and find a size that fits.

    Raises:
        ResourceError: no size fits, or the user has chosen the size.
    """
    state.optimizer.zero_grad(set_to_none=True)
    _save_last(ctx, state)
    state.micro_batch_size = shrink_micro_batch_size(
        ctx, config, state.model, state.micro_batch_size
    )


def _prepare_model(ctx: TrainContext, state: TrainingState) -> None:
    prepare_model(state.model, ctx.config.train, ctx.world, ctx.device)


def _is_done(config: Config, state: TrainingState) -> bool:
    """Whether a stage has completed its epochs, or too many of them without a better IoU."""
    return state.stage_epoch >= config.train.epochs or _is_out_of_patience(config, state)


def _is_out_of_patience(config: Config, state: TrainingState) -> bool:
    ious, patience = state.stage_ious(), config.train.patience
    return patience is not None and bool(ious) and len(ious) - 1 - int(np.argmax(ious)) >= patience


def _train_and_validate(ctx: TrainContext, stage: StageData, state: TrainingState) -> Row:
    """Train and validate one epoch, and return its metrics.

    Raises:
        Stopped: a signal was received; the state is saved.
    """
    started = time.perf_counter()
    try:
        with worker_errors(stage.train_loader.tracker):
            trained = train_one_epoch(ctx, stage, state, save=partial(_save_last, ctx, state))
        model = state.eval_model
        with memory_errors():
            if stage.config.train.bn_eval == "recalibrate":
                recalibrate_batch_norm(ctx, stage, model, state.micro_batch_size)
            metrics = validate(ctx, stage, model)
    except Stopped as stopped:
        _save_last(ctx, state)
        raise Stopped(
            stopped.received,
            f"the state after step {state.global_step} is saved; --resume auto continues",
        ) from None
    return {
        "epoch": state.epoch + 1,
        "stage": state.stage + 1,
        "global_step": state.global_step,
        **trained,
        **metrics,
        "seconds": round(time.perf_counter() - started, 3),
    }


def _finish_epoch(ctx: TrainContext, stage: StageData, state: TrainingState, row: Row) -> None:
    """Count the epoch as completed and save it."""
    state.history.append(row)
    state.epoch += 1
    state.stage_epoch += 1
    state.begin_epoch()
    if state.rolled_back_epoch == state.epoch - 1 and state.stats.in_a_row:
        # The epoch ended with skipped steps: keep counting it as the rollback epoch.
        state.rolled_back_epoch = state.epoch
    if _is_out_of_patience(stage.config, state):
        row["stopped_early"] = state.stage_epoch < stage.config.train.epochs
    if row["val/person_iou"] > state.best_iou:
        state.best_iou, state.best_epoch = row["val/person_iou"], state.epoch
        if ctx.world.is_main:
            save_best(ctx.run, state, ctx.config, ctx.data)
    _save_last(ctx, state)


def _save_last(ctx: TrainContext, state: TrainingState) -> None:
    if ctx.world.is_main:
        save_last(ctx.run, state, ctx.config, ctx.data)
        point_latest_at(ctx.run)


def _rewrite_outputs(
    ctx: TrainContext, config: Config, state: TrainingState, outputs: RunOutputs
) -> None:
    """Write the outputs of the last epoch if the run was killed after saving its checkpoint.

    If the run continues from an older checkpoint, this also drops the rows of later epochs.
    """
    metrics = ctx.run.metrics
    num_written = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
    if not state.history or num_written == len(state.history):
        return
    samples = []
    if not state.samples_seen and state.stage_epoch:  # the weights are those of the last epoch
        stage = open_stage(ctx, state.stage, config, state.micro_batch_size)
        samples = list(predict_samples(ctx, stage, state.eval_model))
    outputs.write(state.history, samples)


def _warn_of_damaged_images(stage: StageData) -> None:
    for split, loader in (("training", stage.train_loader), ("validation", stage.val_loader)):
        if loader.damaged:
            first = min(loader.damaged)
            log.warning(f"{split}: {len(loader.damaged)} damaged images skipped, first: {first}")
