"""Losses and gradients that are not finite: skipped steps, rollback, and giving up."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.command import Command
from helpers.faults import (
    TINY,
    Forward,
    ForwardPatch,
    PatchedForward,
    assert_one_error,
    bad_gradient,
    digests,
    fault_at,
    largest_difference,
    last_checkpoint,
    overflow,
    rows,
    warnings_of,
)
from torch import Tensor

from segtrain.checkpoint import load_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread", "no_curves")

# The toy data set has eight images: four steps per epoch.
STEPS_PER_EPOCH = 4
RUN = Path("runs/toy")


@pytest.fixture
def train(segtrain: Command, toy_coco: Path) -> Callable[..., Any]:
    def command(*arguments: str | Path, name: str = "toy") -> Any:
        return segtrain(
            *("train", "--data", toy_coco, *TINY, "--batch-size", "2", "--name", name, *arguments)
        )

    return command


Train = Callable[..., Any]


# --------------------------------------------------------------------------- skipped steps


@pytest.mark.parametrize("fault", [overflow, bad_gradient])
def test_a_step_that_is_not_finite_is_skipped(
    train: Train, monkeypatch: pytest.MonkeyPatch, fault: Any
) -> None:
    """It is the only step of the epoch, so only counters may change."""
    PatchedForward(monkeypatch, fault_at({1}, fault))

    finished = train("--epochs", "1", "--batch-size", "8")

    assert finished.code == 0, finished.err
    # previous.pt holds the state before the first step.
    before, after = (load_checkpoint(RUN / "checkpoints" / f"{n}.pt") for n in ("previous", "last"))
    params = [name for name in before.weights if "running" not in name and "num_" not in name]
    assert params
    assert all(torch.equal(before.weights[name], after.weights[name]) for name in params)
    assert (before.global_step, after.global_step) == (0, 1)
    [row] = rows(RUN)
    assert row["skipped_steps"] == 1


def test_skipped_steps_are_counted_and_reported_after_each_epoch(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    PatchedForward(monkeypatch, fault_at({2, 4, 6}))

    finished = train("--epochs", "3")

    assert finished.code == 0, finished.err
    assert [row["skipped_steps"] for row in rows(RUN)] == [2, 1, 0]
    first, second = warnings_of(finished)
    assert "epoch 1" in first
    assert first.endswith(" 2")
    assert "epoch 2" in second
    assert second.endswith(" 1")
    assert "skipped steps" in finished.out  # in the summary
    assert all(row["train/loss"] > 0 for row in rows(RUN))


# --------------------------------------------------------------------------- rollback


@pytest.mark.parametrize("fault", [overflow, bad_gradient])
@pytest.mark.parametrize("workers", ["0", pytest.param("2", marks=pytest.mark.slow)])
def test_after_three_skipped_steps_the_run_equals_one_resumed_with_half_the_learning_rate(
    train: Train, monkeypatch: pytest.MonkeyPatch, fault: Any, workers: str
) -> None:
    """Bit for bit, including batch-norm statistics and the averaged weights."""
    more = ["--workers", workers, "--set", "train.ema_decay=0.9"]
    assert train("--epochs", "1", *more, name="resumed").code == 0
    assert (
        train("--epochs", "2", "--lr", "1e-3", *more, "--resume", "auto", name="resumed").code == 0
    )

    steps = PatchedForward(monkeypatch, fault_at({6, 7, 8}, fault))
    finished = train("--epochs", "2", *more)

    assert finished.code == 0, finished.err
    # Step 5 is repeated: the last save was after the first epoch.
    assert steps.count == STEPS_PER_EPOCH + 4 + STEPS_PER_EPOCH
    [warning] = warnings_of(finished)
    assert "3 steps in a row" in warning
    assert f"after step {STEPS_PER_EPOCH}" in warning
    assert "0.5" in warning
    resumed = Path("runs/resumed")
    assert largest_difference(last_checkpoint(RUN), last_checkpoint(resumed)) == 0
    assert largest_difference(RUN / "checkpoints/best.pt", resumed / "checkpoints/best.pt") == 0
    ema, expected = (load_checkpoint(last_checkpoint(r)).training["ema"] for r in (RUN, resumed))
    assert all(torch.equal(ema[name], expected[name]) for name in ema)
    assert rows(RUN)[1]["lr"] == rows(resumed)[1]["lr"]
    assert rows(RUN)[1]["train/loss"] == rows(resumed)[1]["train/loss"]


def test_the_lower_learning_rate_survives_a_stop(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    def act(number: int, image: Tensor, forward: Forward) -> Tensor:
        if number == 6:  # the second step of the epoch after the rollback
            os.kill(os.getpid(), signal.SIGTERM)
        return overflow(image, forward) if number <= 3 else forward(image)

    steps = PatchedForward(monkeypatch, act)
    stopped = train("--epochs", "2")
    assert stopped.code == 143, stopped.err
    assert steps.count == 6

    finished = train("--epochs", "2", "--resume", "auto")

    assert finished.code == 0, finished.err
    first, second = rows(RUN)
    assert first["lr"] == pytest.approx(1e-3)
    assert second["lr"] == pytest.approx(1e-3 * 0.995)
    assert load_checkpoint(last_checkpoint(RUN)).training["lr_factor"] == 0.5


def test_a_rollback_restores_the_last_state_saved_by_save_every(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    PatchedForward(monkeypatch, fault_at({3, 4, 5}))  # in a row across the end of an epoch

    finished = train("--epochs", "2", "--save-every", "0s")

    assert finished.code == 0, finished.err
    [skipped, rolled_back] = warnings_of(finished)
    # Skipped steps are saved, too, so the last save before the fifth was after the fourth.
    assert "steps skipped" in skipped
    assert "back to the state after step 4" in rolled_back


def test_a_second_divergence_in_the_same_epoch_is_an_error(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    before: dict[str, str] = {}

    def act(number: int, image: Tensor, forward: Forward) -> Tensor:
        if number == STEPS_PER_EPOCH + 1:
            before.update(digests(RUN))
        return overflow(image, forward) if number > STEPS_PER_EPOCH else forward(image)

    steps = PatchedForward(monkeypatch, act)
    finished = train("--epochs", "3")

    line = assert_one_error(finished, 6)
    assert "epoch 2" in line
    assert "--lr" in line
    assert steps.count == STEPS_PER_EPOCH + 3 + 3
    assert digests(RUN) == before
    assert before.keys() == {"last.pt", "previous.pt", "best.pt"}
    for name in before:
        load_checkpoint(RUN / "checkpoints" / name)


def test_a_second_divergence_in_the_same_epoch_is_an_error_after_a_stop_too(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    def act(number: int, image: Tensor, forward: Forward) -> Tensor:
        if number == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(image) if number == 4 else overflow(image, forward)

    steps = PatchedForward(monkeypatch, act)
    assert train("--epochs", "3").code == 143
    before = digests(RUN)

    assert_one_error(train("--epochs", "3", "--resume", "auto"), 6)
    assert steps.count == 4 + 3
    assert digests(RUN) == before


def test_after_a_good_epoch_another_rollback_is_possible(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 1-3 diverge, 4-7 are a whole epoch, 8-10 diverge. Without the epoch it would be an error.
    PatchedForward(monkeypatch, fault_at({1, 2, 3, 8, 9, 10}))

    finished = train("--epochs", "2")

    assert finished.code == 0, finished.err
    first, second = warnings_of(finished)
    assert "times 0.5" in first
    assert "times 0.25" in second
    assert load_checkpoint(last_checkpoint(RUN)).training["lr_factor"] == 0.25
    assert rows(RUN)[1]["lr"] == pytest.approx(2e-3 * 0.995 / 4)


def test_an_epoch_that_ends_with_skipped_steps_does_not_count_as_good(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise, with epochs of two steps, a ruined network would be rolled back without end."""
    steps = PatchedForward(monkeypatch, fault_at(set(range(2, 99))))

    line = assert_one_error(train("--epochs", "9", "--batch-size", "4"), 6)

    # 1 is good; 2, 3, 4 cause a rollback to the end of the first epoch; then 3, 4 and 5 fail.
    assert steps.count == 4 + 3
    assert "epoch 3" in line


def test_saved_skipped_steps_do_not_count_after_a_rollback(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 3 and 4 are skipped and saved; 5 makes three in a row; after the rollback, 6 is one."""
    PatchedForward(monkeypatch, fault_at({3, 4, 5, 6}))

    finished = train("--epochs", "2")

    assert finished.code == 0, finished.err
    assert len(warnings_of(finished)) == 3  # skipped, rolled back, skipped
    assert [row["skipped_steps"] for row in rows(RUN)] == [2, 1]


def test_a_stage_that_diverges_is_rolled_back_to_its_own_start(
    train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It has another optimizer than the previous stage, whose state would not fit."""
    stages = tmp_path / "stages.yaml"
    stages.write_text("stages:\n- {epochs: 2, optim: {name: sgd, momentum: 0.9, lr: 0.01}}\n")
    steps = PatchedForward(monkeypatch, fault_at({5, 6, 7}))

    finished = train("--config", stages, "--epochs", "1")

    assert finished.code == 0, finished.err
    assert steps.count == STEPS_PER_EPOCH + 3 + 2 * STEPS_PER_EPOCH
    [warning] = warnings_of(finished)
    assert "back to the state after step 4" in warning
    assert [row["stage"] for row in rows(RUN)] == [1, 2, 2]
    assert rows(RUN)[1]["lr"] == pytest.approx(0.005)


def test_a_stage_that_always_diverges_is_an_error(
    train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It is not restarted without end."""
    stages = tmp_path / "stages.yaml"
    stages.write_text("stages:\n- {epochs: 2, optim: {lr: 0.01}}\n")
    steps = PatchedForward(monkeypatch, fault_at(set(range(STEPS_PER_EPOCH + 1, 99))))

    assert_one_error(train("--config", stages, "--epochs", "1"), 6)
    assert steps.count == STEPS_PER_EPOCH + 3 + 3


# --------------------------------------------------------------------------- fp16


def test_in_fp16_twenty_skipped_steps_are_an_error(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = PatchedForward(monkeypatch, fault_at(set(range(1, 99))))

    finished = train("--epochs", "9", "--precision", "fp16", "--set", "train.ema_decay=0.9")

    line = assert_one_error(finished, 6)
    assert "20 steps in a row" in line
    assert "--precision fp32" in line
    assert steps.count == 20
    loaded = load_checkpoint(last_checkpoint(RUN))  # rejects values that are not finite
    buffers = [name for name in loaded.weights if "running" in name]
    assert buffers
    assert all(loaded.weights[name].isfinite().all() for name in buffers)
    assert [row["skipped_steps"] for row in rows(RUN)] == [4, 4, 4, 4]


def test_in_fp16_training_continues_after_nineteen_skipped_steps(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient scaler finds its scale by steps that overflow."""
    PatchedForward(monkeypatch, fault_at(set(range(1, 20)), bad_gradient))

    finished = train("--epochs", "5", "--precision", "fp16")

    assert finished.code == 0, finished.err
    assert [row["skipped_steps"] for row in rows(RUN)] == [4, 4, 4, 4, 3]


# --------------------------------------------------------------------------- running statistics


@pytest.mark.parametrize("check_every", [1, 10])
@pytest.mark.parametrize("moment", ["in the step", "after it"])
def test_a_signal_at_an_overflow_leaves_finite_statistics(
    train: Train, monkeypatch: pytest.MonkeyPatch, check_every: int, moment: str
) -> None:
    """On GPUs, checks are ten steps apart, so the overflow has not been detected yet."""
    monkeypatch.setattr("segtrain.training.epoch._CHECK_EVERY", {"cpu": check_every})
    signalled = False

    def stop(*_: object) -> bool:
        nonlocal signalled
        if steps.count == 2 and not signalled:
            signalled = True
            os.kill(os.getpid(), signal.SIGTERM)
        return False

    def act(number: int, image: Tensor, forward: Forward) -> Tensor:
        if number == 2 and moment == "in the step":
            os.kill(os.getpid(), signal.SIGTERM)
        return overflow(image, forward) if number == 2 else forward(image)

    if moment == "after it":
        # Between the signal checks of this step and the next.
        monkeypatch.setattr("segtrain.training.epoch._save_is_due", stop)
    steps = PatchedForward(monkeypatch, act)
    finished = train("--epochs", "1", "--set", "train.ema_decay=0.9")

    num_steps = 2 if moment == "in the step" else 3  # then it stops after the next step
    assert finished.code == 143, finished.err
    assert steps.count == num_steps
    loaded = load_checkpoint(last_checkpoint(RUN))
    assert loaded.global_step == num_steps
    assert all(value.isfinite().all() for value in loaded.training["ema"].values())
    assert loaded.weights["encoders.0.1.running_var"].isfinite().all()
    resumed = train("--epochs", "1", "--set", "train.ema_decay=0.9", "--resume", "auto")
    assert resumed.code == 0, resumed.err
    assert rows(RUN)[0]["skipped_steps"] == 1


@pytest.mark.parametrize("check_every", [1, 10])
def test_statistics_stay_finite_without_a_skipped_step(
    train: Train, monkeypatch: pytest.MonkeyPatch, check_every: int
) -> None:
    """If all pixels of a batch are ignored, its loss and gradient are 0 even after an overflow."""
    monkeypatch.setattr("segtrain.training.epoch._CHECK_EVERY", {"cpu": check_every})

    def overflow_without_loss(image: Tensor, forward: Forward) -> Tensor:
        logits = forward(image)
        with torch.no_grad():
            overflow(image, forward)
        return logits

    PatchedForward(monkeypatch, fault_at({2}, overflow_without_loss))
    finished = train("--epochs", "1", "--set", "train.ema_decay=0.9")

    assert finished.code == 0, finished.err
    assert rows(RUN)[0]["skipped_steps"] == 0


def test_a_run_without_a_fault_has_no_warnings(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the tests above would prove nothing."""
    act: ForwardPatch = fault_at(set())
    PatchedForward(monkeypatch, act)

    finished = train("--epochs", "2")

    assert finished.code == 0, finished.err
    assert warnings_of(finished) == []
    assert load_checkpoint(last_checkpoint(RUN)).training["lr_factor"] == 1.0
