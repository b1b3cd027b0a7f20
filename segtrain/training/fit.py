"""The whole training: through all stages and epochs, train, judge, save and tell."""

import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from segtrain.checkpoint import load_checkpoint
from segtrain.config import Config, stage_configs
from segtrain.data.workers import worker_errors
from segtrain.errors import CheckpointError, DivergedError
from segtrain.runs import point_latest_at
from segtrain.stopping import Stopped
from segtrain.training.batch_size import images_at_once, smaller_number
from segtrain.training.epoch import Diverging, NoMemory, memory_errors, train_one_epoch
from segtrain.training.logs import Row, RunLog
from segtrain.training.network import make_ready
from segtrain.training.outputs import RunOutputs
from segtrain.training.setting import Setting, Stage, open_setting, open_stage
from segtrain.training.start import Start
from segtrain.training.state import (
    TrainingState,
    begin,
    check_space,
    next_stage,
    resume,
    save_best,
    save_last,
)
from segtrain.training.validation import measure_statistics, samples, validate


@dataclass(frozen=True)
class FitResult:
    """How a run ended. history has a row for each epoch, as metrics.jsonl."""

    best_iou: float
    best_epoch: int
    num_epochs: int
    history: list[Row]


def fit(start: Start, log: RunLog) -> FitResult:
    """Train until all epochs of all stages are done.

    After each epoch the validation images are judged at original resolution, and last.pt, best.pt
    (by global person IoU), metrics.jsonl, curves.png and a sheet of samples are written.

    Raises:
        UserError: bad data, no memory, a full disk, or a training that diverged (DivergedError);
            checkpoints written before stay as they are.
        Stopped: a signal came; last.pt holds everything until the last step.
    """
    setting = open_setting(start, log)
    plans = stage_configs(setting.config)
    state = _first_state(setting, plans, start)
    stage = None
    tensorboard = setting.config.train.tensorboard and setting.world.is_first
    with RunOutputs(setting.run, log, tensorboard=tensorboard) as outputs:
        if start.resumed is not None and setting.world.is_first:
            _catch_up(setting, plans[state.stage], state, outputs)
        while not _is_done(plans[state.stage], state) or state.stage + 1 < len(plans):
            if _is_done(plans[state.stage], state):
                state = _begin_next_stage(setting, plans, state)
            if stage is None or stage.number != state.stage:
                if stage is not None:
                    _tell_of_damage(log, stage)
                stage = open_stage(setting, state.stage, plans[state.stage], state.images_at_once)
            try:
                row = _epoch(setting, stage, state)
            except Diverging as diverging:
                state = _gone_back(setting, stage.config, state, diverging)
                continue
            except NoMemory:
                _lower_images_at_once(setting, stage.config, state)
                _tell_of_damage(log, stage)
                stage = None  # its validation batches were of the larger number
                continue
            _conclude(setting, stage, state, row, outputs)
            if setting.world.is_first:
                pictures = list(samples(setting, stage, state.judged_model))
                outputs.write(state.history, pictures)
            num_epochs = state.epoch - state.stage_epoch + stage.config.train.epochs
            outputs.tell(state.history, num_epochs=num_epochs + _epochs_after(plans, state.stage))
    if stage is not None:
        _tell_of_damage(log, stage)
    return FitResult(state.best_iou, state.best_epoch, state.epoch, state.history)


def _first_state(setting: Setting, plans: list[Config], start: Start) -> TrainingState:
    """The state resumed, or a fresh one; last.pt holds it.

    So a disk that is full or read-only is found before the first step, and there is always a state
    to go back to.
    """
    if start.resumed is not None and start.resumed_from is not None:
        training = start.resumed.training
        number = training.get("stage")
        if type(number) is not int or not 0 <= number < len(plans):
            raise CheckpointError(
                f"{start.resumed_from} is in a stage that its configuration does not have; "
                "start a new run"
            )
        plan = plans[number]
        state = resume(
            start.resumed,
            start.resumed_from,
            plan,
            setting.device,
            use_scaler=setting.use_scaler,
        )
        _share_anew(setting, training, state)
        if start.other_validation and not _is_done(plan, state):
            setting.log.warn(
                "the validation pictures are not those before: the best IoU is looked for anew"
            )
            state.best_iou = -1.0
        if setting.use_scaler and not training["scaler"]:
            setting.log.warn("the run was not in fp16 before: its gradient scaler starts afresh")
        before = stage_configs(start.resumed.config)
        looked_before = before[min(number, len(before) - 1)].train.batch_size == "auto"
        if plan.train.batch_size != "auto" or not looked_before:
            state.images_at_once = images_at_once(setting, plan, state.model)
        if start.resumed_from != setting.run.last:
            _save_last(setting, state)
    else:
        state = begin(plans[0], setting.device, use_scaler=setting.use_scaler)
        state.num_processes = setting.world.size
        state.images_at_once = images_at_once(setting, plans[0], state.model)
        if setting.world.is_first:
            save_last(setting.run, state, setting.config, setting.data)
    if setting.world.is_first:
        check_space(setting.run)
    _make_ready(setting, state)
    num_parameters = sum(p.numel() for p in state.model.parameters())
    setting.log.line(f"model: {setting.config.model.name}, {num_parameters:,} parameters")
    return state


def _share_anew(setting: Setting, training: dict[str, Any], state: TrainingState) -> None:
    """Where another number of processes goes on, each has drawn another share of the epoch."""
    if "num_processes" in training:
        state.images_drawn = state.images_drawn * state.num_processes // setting.world.size
    state.num_processes = setting.world.size


def _begin_next_stage(setting: Setting, plans: list[Config], state: TrainingState) -> TrainingState:
    setting.log.line(
        f"stage {state.stage + 2} of {len(plans)}: on with the weights of epoch "
        f"{state.best_epoch}, the best so far"
    )
    plan = plans[state.stage + 1]
    best = setting.run.best
    new = next_stage(
        state,
        plan,
        setting.world.read_by_first(partial(load_checkpoint, best)),
        best,
        setting.device,
        use_scaler=setting.use_scaler,
    )
    new.images_at_once = images_at_once(setting, plan, new.model)
    # What diverges in this stage must not go back into the one before.
    _save_last(setting, new)
    _make_ready(setting, new)
    return new


def _gone_back(
    setting: Setting, plan: Config, state: TrainingState, diverging: Diverging
) -> TrainingState:
    """The state saved last, with half the learning rate; twice in an epoch is too often."""
    if not diverging.may_go_back or state.went_back_in == state.epoch:
        raise DivergedError(
            f"epoch {state.epoch + 1} diverged: {diverging}; checkpoints are kept; "
            "--resume with a lower --lr or --precision fp32"
        )
    new = resume(
        setting.world.read_by_first(partial(load_checkpoint, setting.run.last)),
        setting.run.last,
        plan,
        setting.device,
        use_scaler=setting.use_scaler,
    )
    new.images_at_once = state.images_at_once
    new.lr_factor, new.went_back_in = state.lr_factor / 2, state.epoch
    new.tally.forget_row()
    _make_ready(setting, new)
    setting.log.warn(
        f"{diverging}: back to the state after step {new.global_step}, with the learning rate "
        f"times {new.lr_factor:g}"
    )
    return new


def _lower_images_at_once(setting: Setting, plan: Config, state: TrainingState) -> None:
    """Save what there was before the step that did not fit, and look for what does fit.

    Raises:
        ResourceError: with the advice how to go on, unless the number is ours to choose.
    """
    state.optimizer.zero_grad(set_to_none=True)
    _save_last(setting, state)
    state.images_at_once = smaller_number(setting, plan, state.model, state.images_at_once)


def _make_ready(setting: Setting, state: TrainingState) -> None:
    make_ready(state.model, setting.config.train, setting.world, setting.device)


def _is_done(plan: Config, state: TrainingState) -> bool:
    """Whether a stage has had its epochs, or too many of them without a better IoU."""
    return state.stage_epoch >= plan.train.epochs or _is_out_of_patience(plan, state)


def _is_out_of_patience(plan: Config, state: TrainingState) -> bool:
    ious, patience = state.stage_ious(), plan.train.patience
    return patience is not None and bool(ious) and len(ious) - 1 - int(np.argmax(ious)) >= patience


def _epoch(setting: Setting, stage: Stage, state: TrainingState) -> Row:
    """Train and judge once. Where a signal comes, what there is until then is saved."""
    started = time.perf_counter()
    try:
        with worker_errors(stage.train_set.watched):
            trained = train_one_epoch(
                setting, stage, state, save=partial(_save_last, setting, state)
            )
        model = state.judged_model
        with memory_errors():
            if stage.config.train.bn_eval == "recalibrate":
                measure_statistics(setting, stage, model, state.images_at_once)
            metrics = validate(setting, stage, model)
    except Stopped as stopped:
        _save_last(setting, state)
        raise Stopped(
            stopped.received,
            f"everything until step {state.global_step} is saved; --resume auto continues",
        ) from None
    return {
        "epoch": state.epoch + 1,
        "stage": state.stage + 1,
        "global_step": state.global_step,
        **trained,
        **metrics,
        "seconds": round(time.perf_counter() - started, 3),
    }


def _conclude(
    setting: Setting, stage: Stage, state: TrainingState, row: Row, outputs: RunOutputs
) -> None:
    """Count the epoch as done and save it."""
    state.history.append(row)
    state.epoch += 1
    state.stage_epoch += 1
    state.begin_epoch()
    if state.went_back_in == state.epoch - 1 and state.tally.in_a_row:
        # It ended in the midst of bad steps, so that was no good epoch: the next one still counts
        # as the one in which the training went back.
        state.went_back_in = state.epoch
    if _is_out_of_patience(stage.config, state):
        row["stopped_early"] = state.stage_epoch < stage.config.train.epochs
    if row["val/person_iou"] > state.best_iou:
        state.best_iou, state.best_epoch = row["val/person_iou"], state.epoch
        if setting.world.is_first:
            save_best(setting.run, state, setting.config, setting.data)
    _save_last(setting, state)


def _save_last(setting: Setting, state: TrainingState) -> None:
    if setting.world.is_first:
        save_last(setting.run, state, setting.config, setting.data)
        point_latest_at(setting.run)


def _catch_up(setting: Setting, plan: Config, state: TrainingState, outputs: RunOutputs) -> None:
    """Write what follows from the last epoch, where a kill came between its save and that.

    Where the run goes on from an older checkpoint, what was told of later epochs is taken back.
    """
    metrics = setting.run.metrics
    num_told = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
    if not state.history or num_told == len(state.history):
        return
    pictures = []
    if not state.images_drawn and state.stage_epoch:  # the network is still that of the epoch
        stage = open_stage(setting, state.stage, plan, state.images_at_once)
        pictures = list(samples(setting, stage, state.judged_model))
    outputs.write(state.history, pictures)


def _epochs_after(plans: list[Config], stage: int) -> int:
    return sum(plan.train.epochs for plan in plans[stage + 1 :])


def _tell_of_damage(log: RunLog, stage: Stage) -> None:
    for split, batches in (("training", stage.train_set), ("validation", stage.val_set)):
        if batches.damaged:
            first = min(batches.damaged)
            log.warn(f"{split}: {len(batches.damaged)} pictures left out, first: {first}")
