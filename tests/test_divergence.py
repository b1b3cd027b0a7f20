"""Losses and gradients that are no numbers: left out, gone back from, and in the end given up."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Command
from faults import (
    TINY,
    Act,
    Forward,
    Steps,
    assert_one_error,
    at,
    bad_gradient,
    digests,
    largest_difference,
    last,
    overflowing,
    rows,
    warnings_of,
)
from torch import Tensor

from segtrain.checkpoint import load_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread", "no_curves")

# The toy data set has eight pictures: four steps an epoch.
STEPS = 4
RUN = Path("runs/toy")


@pytest.fixture
def train(segtrain: Command, toy_coco: Path) -> Callable[..., Any]:
    def command(*arguments: str | Path, name: str = "toy") -> Any:
        return segtrain(
            *("train", "--data", toy_coco, *TINY, "--batch-size", "2", "--name", name, *arguments)
        )

    return command


Train = Callable[..., Any]


# --------------------------------------------------------------------------- a step left out


@pytest.mark.parametrize("fault", [overflowing, bad_gradient])
def test_a_step_that_is_no_number_is_not_taken(
    train: Train, monkeypatch: pytest.MonkeyPatch, fault: Any
) -> None:
    """It is the only one of the epoch, so nothing but counts may change."""
    Steps(monkeypatch, at({1}, fault))

    finished = train("--epochs", "1", "--batch-size", "8")

    assert finished.code == 0, finished.err
    # previous.pt is the state before the first step.
    before, after = (load_checkpoint(RUN / "checkpoints" / f"{n}.pt") for n in ("previous", "last"))
    trained = [name for name in before.weights if "running" not in name and "num_" not in name]
    assert trained
    assert all(torch.equal(before.weights[name], after.weights[name]) for name in trained)
    assert (before.global_step, after.global_step) == (0, 1)
    [row] = rows(RUN)
    assert row["skipped_steps"] == 1


def test_steps_left_out_are_counted_and_said_at_the_end_of_their_epoch(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    Steps(monkeypatch, at({2, 4, 6}))

    finished = train("--epochs", "3")

    assert finished.code == 0, finished.err
    assert [row["skipped_steps"] for row in rows(RUN)] == [2, 1, 0]
    first, second = warnings_of(finished)
    assert "epoch 1" in first
    assert first.endswith(" 2")
    assert "epoch 2" in second
    assert second.endswith(" 1")
    assert "steps left out" in finished.out  # in the summary
    assert all(row["train/loss"] > 0 for row in rows(RUN))


# --------------------------------------------------------------------------- going back


@pytest.mark.parametrize("fault", [overflowing, bad_gradient])
@pytest.mark.parametrize("workers", ["0", pytest.param("2", marks=pytest.mark.slow)])
def test_three_in_a_row_go_back_and_the_run_is_one_resumed_with_half_the_rate(
    train: Train, monkeypatch: pytest.MonkeyPatch, fault: Any, workers: str
) -> None:
    """Bit for bit, batch norm's statistics and the average included."""
    more = ["--workers", workers, "--set", "train.ema_decay=0.9"]
    assert train("--epochs", "1", *more, name="resumed").code == 0
    assert (
        train("--epochs", "2", "--lr", "1e-3", *more, "--resume", "auto", name="resumed").code == 0
    )

    steps = Steps(monkeypatch, at({6, 7, 8}, fault))
    finished = train("--epochs", "2", *more)

    assert finished.code == 0, finished.err
    # Step 5 is taken again: the last save is that after the first epoch.
    assert steps.count == STEPS + 4 + STEPS
    [warning] = warnings_of(finished)
    assert "3 steps in a row" in warning
    assert f"after step {STEPS}" in warning
    assert "0.5" in warning
    resumed = Path("runs/resumed")
    assert largest_difference(last(RUN), last(resumed)) == 0
    assert largest_difference(RUN / "checkpoints/best.pt", resumed / "checkpoints/best.pt") == 0
    average, expected = (load_checkpoint(last(r)).training["average"] for r in (RUN, resumed))
    assert all(torch.equal(average[name], expected[name]) for name in average)
    assert rows(RUN)[1]["lr"] == rows(resumed)[1]["lr"]
    assert rows(RUN)[1]["train/loss"] == rows(resumed)[1]["train/loss"]


def test_the_lower_rate_survives_a_stop(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    def act(number: int, image: Tensor, forward: Forward) -> Tensor:
        if number == 6:  # the epoch's second step, after going back
            os.kill(os.getpid(), signal.SIGTERM)
        return overflowing(image, forward) if number <= 3 else forward(image)

    steps = Steps(monkeypatch, act)
    stopped = train("--epochs", "2")
    assert stopped.code == 143, stopped.err
    assert steps.count == 6

    finished = train("--epochs", "2", "--resume", "auto")

    assert finished.code == 0, finished.err
    first, second = rows(RUN)
    assert first["lr"] == pytest.approx(1e-3)
    assert second["lr"] == pytest.approx(1e-3 * 0.995)
    assert load_checkpoint(last(RUN)).training["lr_factor"] == 0.5


def test_going_back_within_an_epoch_goes_to_what_save_every_saved(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    Steps(monkeypatch, at({3, 4, 5}))  # in a row over the end of an epoch, too

    finished = train("--epochs", "2", "--save-every", "0s")

    assert finished.code == 0, finished.err
    [warning, counted] = warnings_of(finished)
    # Steps left out are saved as such, so the fifth is what there was last.
    assert "steps left out" in warning
    assert "back to the state after step 4" in counted


def test_a_second_time_in_the_same_epoch_gives_up(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    before: dict[str, str] = {}

    def act(number: int, image: Tensor, forward: Forward) -> Tensor:
        if number == STEPS + 1:
            before.update(digests(RUN))
        return overflowing(image, forward) if number > STEPS else forward(image)

    steps = Steps(monkeypatch, act)
    finished = train("--epochs", "3")

    line = assert_one_error(finished, 6)
    assert "epoch 2" in line
    assert "--lr" in line
    assert steps.count == STEPS + 3 + 3
    assert digests(RUN) == before
    assert before.keys() == {"last.pt", "previous.pt", "best.pt"}
    for name in before:
        load_checkpoint(RUN / "checkpoints" / name)


def test_a_second_time_is_one_after_a_stop_too(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    def act(number: int, image: Tensor, forward: Forward) -> Tensor:
        if number == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(image) if number == 4 else overflowing(image, forward)

    steps = Steps(monkeypatch, act)
    assert train("--epochs", "3").code == 143
    before = digests(RUN)

    assert_one_error(train("--epochs", "3", "--resume", "auto"), 6)
    assert steps.count == 4 + 3
    assert digests(RUN) == before


def test_after_a_good_epoch_it_goes_back_again(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Twice in the second epoch's place would give up: 1-3, then a whole epoch 4-7, then 8-10.
    Steps(monkeypatch, at({1, 2, 3, 8, 9, 10}))

    finished = train("--epochs", "2")

    assert finished.code == 0, finished.err
    one, other = warnings_of(finished)
    assert "times 0.5" in one
    assert "times 0.25" in other
    assert load_checkpoint(last(RUN)).training["lr_factor"] == 0.25
    assert rows(RUN)[1]["lr"] == pytest.approx(2e-3 * 0.995 / 4)


def test_an_epoch_that_ends_in_bad_steps_is_no_good_one(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or with epochs of two steps a network that is ruined would go back in every second one."""
    steps = Steps(monkeypatch, at(set(range(2, 99))))

    line = assert_one_error(train("--epochs", "9", "--batch-size", "4"), 6)

    # 1 is good; 2, 3, 4 go back to the end of the first epoch; then 3, 4 and 5.
    assert steps.count == 4 + 3
    assert "epoch 3" in line


def test_two_in_a_row_saved_do_not_count_against_the_next_try(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 3 and 4 are left out and saved so; 5 makes three, and after going back 6 is one."""
    Steps(monkeypatch, at({3, 4, 5, 6}))

    finished = train("--epochs", "2")

    assert finished.code == 0, finished.err
    assert len(warnings_of(finished)) == 3  # left out, gone back, left out
    assert [row["skipped_steps"] for row in rows(RUN)] == [2, 1]


def test_a_stage_that_diverges_goes_back_to_its_own_beginning(
    train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With another optimizer than the stage before, whose state would not fit."""
    stages = tmp_path / "stages.yaml"
    stages.write_text("stages:\n- {epochs: 2, optim: {name: sgd, momentum: 0.9, lr: 0.01}}\n")
    steps = Steps(monkeypatch, at({5, 6, 7}))

    finished = train("--config", stages, "--epochs", "1")

    assert finished.code == 0, finished.err
    assert steps.count == STEPS + 3 + 2 * STEPS
    [warning] = warnings_of(finished)
    assert "back to the state after step 4" in warning
    assert [row["stage"] for row in rows(RUN)] == [1, 2, 2]
    assert rows(RUN)[1]["lr"] == pytest.approx(0.005)


def test_a_stage_that_always_diverges_gives_up(
    train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And does not begin again for ever."""
    stages = tmp_path / "stages.yaml"
    stages.write_text("stages:\n- {epochs: 2, optim: {lr: 0.01}}\n")
    steps = Steps(monkeypatch, at(set(range(STEPS + 1, 99))))

    assert_one_error(train("--config", stages, "--epochs", "1"), 6)
    assert steps.count == STEPS + 3 + 3


# --------------------------------------------------------------------------- fp16


def test_fp16_gives_up_after_twenty_steps_not_after_three(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Steps(monkeypatch, at(set(range(1, 99))))

    finished = train("--epochs", "9", "--precision", "fp16", "--set", "train.ema_decay=0.9")

    line = assert_one_error(finished, 6)
    assert "20 steps in a row" in line
    assert "--precision fp32" in line
    assert steps.count == 20
    loaded = load_checkpoint(last(RUN))  # which refuses what is not finite
    buffers = [name for name in loaded.weights if "running" in name]
    assert buffers
    assert all(loaded.weights[name].isfinite().all() for name in buffers)
    assert [row["skipped_steps"] for row in rows(RUN)] == [4, 4, 4, 4]


def test_fp16_goes_on_after_nineteen(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """It looks for its scale by steps that overflow."""
    Steps(monkeypatch, at(set(range(1, 20)), bad_gradient))

    finished = train("--epochs", "5", "--precision", "fp16")

    assert finished.code == 0, finished.err
    assert [row["skipped_steps"] for row in rows(RUN)] == [4, 4, 4, 4, 3]


# --------------------------------------------------------------------------- what is left behind


@pytest.mark.parametrize("steps_a_look", [1, 10])
@pytest.mark.parametrize("moment", ["in the step", "after it"])
def test_a_signal_right_at_an_overflow_leaves_finite_statistics(
    train: Train, monkeypatch: pytest.MonkeyPatch, steps_a_look: int, moment: str
) -> None:
    """Ten steps a look are what GPUs get: nobody knows yet that there was an overflow."""
    monkeypatch.setattr("segtrain.training.epoch._STEPS_A_LOOK", {"cpu": steps_a_look})
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
        return overflowing(image, forward) if number == 2 else forward(image)

    if moment == "after it":
        # Between this step's look for signals and the next one's.
        monkeypatch.setattr("segtrain.training.epoch._is_due", stop)
    steps = Steps(monkeypatch, act)
    finished = train("--epochs", "1", "--set", "train.ema_decay=0.9")

    taken = 2 if moment == "in the step" else 3  # heard after the next step
    assert finished.code == 143, finished.err
    assert steps.count == taken
    loaded = load_checkpoint(last(RUN))
    assert loaded.global_step == taken
    assert all(value.isfinite().all() for value in loaded.training["average"].values())
    assert loaded.weights["encoders.0.1.running_var"].isfinite().all()
    resumed = train("--epochs", "1", "--set", "train.ema_decay=0.9", "--resume", "auto")
    assert resumed.code == 0, resumed.err
    assert rows(RUN)[0]["skipped_steps"] == 1


@pytest.mark.parametrize("steps_a_look", [1, 10])
def test_statistics_stay_finite_though_nobody_is_counted_as_bad(
    train: Train, monkeypatch: pytest.MonkeyPatch, steps_a_look: int
) -> None:
    """A batch that overflows where no pixel counts has a loss of nothing and a gradient of none."""
    monkeypatch.setattr("segtrain.training.epoch._STEPS_A_LOOK", {"cpu": steps_a_look})

    def unseen(image: Tensor, forward: Forward) -> Tensor:
        logits = forward(image)
        with torch.no_grad():
            overflowing(image, forward)
        return logits

    Steps(monkeypatch, at({2}, unseen))
    finished = train("--epochs", "1", "--set", "train.ema_decay=0.9")

    assert finished.code == 0, finished.err
    assert rows(RUN)[0]["skipped_steps"] == 0


def test_a_run_without_a_fault_says_nothing(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or none of the above would prove anything."""
    act: Act = at(set())
    Steps(monkeypatch, act)

    finished = train("--epochs", "2")

    assert finished.code == 0, finished.err
    assert warnings_of(finished) == []
    assert load_checkpoint(last(RUN)).training["lr_factor"] == 1.0
