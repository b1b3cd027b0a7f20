"""A run that was stopped and resumed is the run that was never stopped, bit for bit."""

import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coco_fixtures import make_toy_coco
from conftest import Command, Finished
from interruptions import (
    Case,
    after_step,
    assert_same_training,
    digests,
    kill_self,
    leftovers,
    metrics_rows,
    run_cases,
)

import segtrain.training.epoch
import segtrain.training.fit
import segtrain.training.start
import segtrain.training.validation
from segtrain.checkpoint import load_checkpoint, save_checkpoint
from segtrain.cli import run
from segtrain.data.loading import Batches
from segtrain.data.workers import begin_worker

pytestmark = pytest.mark.usefixtures("one_thread")

CHECKPOINT = 4
NUM_TRAIN, STEPS_AN_EPOCH = 24, 6
ALL = ("--image-size", "48", "--precision", "fp32", "--device", "cpu")


def sets(*settings: str) -> list[str]:
    return [argument for setting in settings for argument in ("--set", setting)]


UNET = [*ALL, *sets("model.base_channels=4", "model.depth=2", "optim.warmup_steps=3")]
# Dropout draws in every step.
TIRAMISU = [
    *(*ALL, "--model", "fc_densenet56", "--epochs", "2", "--batch-size", "4"),
    *sets("model.down_blocks=[1]", "model.up_blocks=[1]", "model.bottleneck=1"),
]
PLAIN = [*UNET, "--epochs", "2", "--batch-size", "4"]
# Name → arguments and optimizer steps. What a step depends on besides the weights differs in each.
EXPERIMENTS: dict[str, tuple[list[str], int]] = {
    "dropout": (TIRAMISU, 12),
    "average": (
        [
            *(*UNET, "--epochs", "3", "--batch-size", "4"),
            *sets("train.ema_decay=0.9", "train.accumulation_steps=2", "optim.schedule=cosine"),
            *sets("optim.name=adamw", "train.bn_eval=recalibrate"),
        ],
        9,
    ),
    "plateau": (
        [
            *(*UNET, "--epochs", "6", "--batch-size", "12", "--lr", "1e-5"),
            *sets("optim.schedule=plateau", "optim.plateau_patience=1", "train.patience=3"),
        ],
        8,
    ),
    "stages": (
        [
            *(*TIRAMISU, "--epochs", "1", "--config", "stages.yaml"),
        ],
        14,
    ),
    "whole": (
        [
            *(*UNET, "--epochs", "2", "--batch-size", "1"),
            *sets("data.whole=true", "train.accumulation_steps=4", "loss.name=border_ce"),
        ],
        12,
    ),
}
STAGES = """
stages:
  - epochs: 2
    data: {augment: standard}
    optim: {name: adam, lr: 1.0e-4, warmup_steps: 2}
    train: {batch_size: 6, ema_decay: 0.9}
"""
# The stop lies in the second stage.
FIRST_STOP = {"stages": STEPS_AN_EPOCH + 1}


def without_epochs_twice(arguments: list[str]) -> list[str]:
    """The command line takes an option once; the last one counts here."""
    places = [place for place, argument in enumerate(arguments) if argument == "--epochs"]
    for place in reversed(places[:-1]):
        arguments = arguments[:place] + arguments[place + 2 :]
    return arguments


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    return make_toy_coco(folder / "coco", num_train=NUM_TRAIN, num_val=4)


@pytest.fixture(autouse=True)
def _stages(tmp_path: Path) -> None:
    (tmp_path / "stages.yaml").write_text(STAGES)


@pytest.fixture(scope="module")
def straight(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[list[str]], Path]:
    """The run of an experiment that nothing has stopped; made once."""
    made: dict[tuple[str, ...], Path] = {}

    def of(arguments: list[str]) -> Path:
        arguments = without_epochs_twice(arguments)
        key = tuple(arguments)
        if key not in made:
            output = tmp_path_factory.mktemp("straight")
            assert run(train(toy, arguments, "--output", str(output), "--name", "s")) == 0
            made[key] = output / "s"
        return made[key]

    return of


def train(toy: Path, arguments: list[str], *more: str) -> list[str]:
    arguments = without_epochs_twice(arguments)
    workers = [] if "--workers" in more else ["--workers", "0"]
    return ["train", "--data", str(toy), *arguments, *workers, *more]


def forget_this_process() -> None:
    """A new process knows nothing of the random numbers that were drawn in the old one."""
    noise = int.from_bytes(os.urandom(4), "little")
    random.seed(noise)
    np.random.seed(noise)  # noqa: NPY002, it is what a careless augmentation would draw from
    torch.manual_seed(noise)


def stop_after(
    segtrain: Command, command: list[str], step: int, number: int = signal.SIGTERM
) -> Finished:
    """Run `command` until a signal comes right after its step `step`."""
    forget_this_process()
    with pytest.MonkeyPatch.context() as patch:
        after_step(patch.setattr, step, kill_self(number))
        return segtrain(*command)


def assert_stopped(finished: Finished, run_folder: Path, code: int, step: int) -> None:
    assert finished.code == code, finished.err
    assert f"everything until step {step} is saved; --resume auto continues" in finished.err
    assert finished.error_lines == []
    assert "Traceback" not in finished.err
    assert load_checkpoint(run_folder / "checkpoints" / "last.pt").global_step == step
    assert leftovers(run_folder.parent) == []


def assert_error(finished: Finished, code: int, *said: str) -> None:
    assert finished.code == code, finished.err
    [line] = finished.error_lines
    assert len(line) <= 200
    assert "Traceback" not in finished.err
    for words in said:
        assert words in line


# --- Stopped within an epoch --------------------------------------------------------------------


def stopped_and_resumed(
    segtrain: Command, toy: Path, name: str, stops: list[int], workers: str
) -> Path:
    """The run folder of an experiment that was stopped after each of `stops`, and has finished."""
    arguments, num_steps = EXPERIMENTS[name]
    command = train(toy, arguments, "--workers", workers, "--name", "stopped", "--resume", "auto")
    folder = Path("runs/stopped")
    done = 0
    for stop in stops:
        finished = stop_after(segtrain, command, stop - done)
        assert_stopped(finished, folder, 143, stop)
        done = stop
    forget_this_process()
    finished = segtrain(*command)
    assert finished.code == 0, finished.err
    assert load_checkpoint(folder / "checkpoints" / "last.pt").global_step == num_steps
    return folder


def random_stops(name: str, seed: int) -> list[int]:
    """Two steps to stop after."""
    draws = random.Random(f"{name} {seed}")
    steps = range(FIRST_STOP.get(name, 1), EXPERIMENTS[name][1] + 1)
    return sorted(draws.sample(steps, 2))


@pytest.mark.parametrize(
    ("name", "workers"),
    [*((name, "0") for name in EXPERIMENTS), ("dropout", "2")],
)
def test_a_run_stopped_twice_at_random_steps_equals_a_straight_one(
    segtrain: Command, toy: Path, straight: Callable[[list[str]], Path], name: str, workers: str
) -> None:
    unbroken = straight(EXPERIMENTS[name][0])

    folder = stopped_and_resumed(segtrain, toy, name, random_stops(name, 0), workers)

    assert_same_training(folder, unbroken)


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", "2"])
@pytest.mark.parametrize("seed", range(1, 4))
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_more_random_steps(
    segtrain: Command,
    toy: Path,
    straight: Callable[[list[str]], Path],
    name: str,
    seed: int,
    workers: str,
) -> None:
    unbroken = straight(EXPERIMENTS[name][0])

    folder = stopped_and_resumed(segtrain, toy, name, random_stops(name, seed), workers)

    assert_same_training(folder, unbroken)


def unseeded_steps(patch: pytest.MonkeyPatch) -> None:
    real = segtrain.training.epoch._prepare_step

    def unseeded(*args: Any) -> float:
        state = torch.get_rng_state()
        rate = real(*args)
        torch.set_rng_state(state)
        return rate

    patch.setattr(segtrain.training.epoch, "_prepare_step", unseeded)


def begun_again_epoch(patch: pytest.MonkeyPatch) -> None:
    real = Batches.set_epoch
    patch.setattr(Batches, "set_epoch", lambda self, epoch, *, num_done=0: real(self, epoch))


def forgotten_optimizer(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("segtrain.training.state._load_optimizer", lambda optimizer, saved: None)


def forgotten_average(patch: pytest.MonkeyPatch) -> None:
    """It begins again as a copy of the weights."""
    patch.setattr(torch.nn.Module, "load_state_dict", load_all_but_averages)


def load_all_but_averages(
    self: torch.nn.Module, state: dict[str, Any], strict: bool = True, assign: bool = False
) -> None:
    if assign:
        _LOAD_STATE_DICT(self, state, strict=strict, assign=True)


_LOAD_STATE_DICT = torch.nn.Module.load_state_dict


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("dropout", unseeded_steps),
        ("dropout", begun_again_epoch),
        ("average", forgotten_optimizer),
        ("average", forgotten_average),
    ],
)
def test_the_comparison_sees_what_resuming_forgets(
    segtrain: Command,
    toy: Path,
    straight: Callable[[list[str]], Path],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    fault: Callable[[pytest.MonkeyPatch], None],
) -> None:
    """The tests above can fail: without one part of what is saved or seeded they do."""
    unbroken = straight(EXPERIMENTS[name][0])
    fault(monkeypatch)

    with pytest.raises(AssertionError):
        assert_same_training(stopped_and_resumed(segtrain, toy, name, [5, 8], "0"), unbroken)


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), (signal.SIGUSR1, 143), (signal.SIGINT, 130)],
    ids=["TERM", "USR1", "INT"],
)
def test_a_signal_in_mid_epoch_is_heard_within_a_step(
    segtrain: Command,
    toy: Path,
    straight: Callable[[list[str]], Path],
    number: int,
    code: int,
) -> None:
    arguments = [*PLAIN, *sets("train.ema_decay=0.9")]
    command = train(toy, arguments, "--name", "x", "--resume", "auto")

    stopped = stop_after(segtrain, command, STEPS_AN_EPOCH + 2, number)
    assert_stopped(stopped, Path("runs/x"), code, STEPS_AN_EPOCH + 2)
    forget_this_process()
    resumed = segtrain(*command)

    assert resumed.code == 0, resumed.err
    assert f"in the midst of the next at step {STEPS_AN_EPOCH + 2}" in resumed.out
    assert_same_training(Path("runs/x"), straight(arguments))


@pytest.mark.slow
def test_a_signal_to_the_whole_group_is_heard_as_one_to_the_process(
    segtrain: Command, toy: Path, straight: Callable[[list[str]], Path], tmp_path: Path
) -> None:
    """Loader processes belong to the group, too."""
    arguments = [*PLAIN, *sets("train.ema_decay=0.9")]
    command = train(toy, arguments, "--workers", "2", "--name", "x", "--resume", "auto")
    codes = {signal.SIGUSR1: 143, signal.SIGINT: 130}
    cases = []
    for number in codes:
        folder = tmp_path / number.name
        folder.mkdir()
        cases.append(
            Case(folder=folder, arguments=command, step=3, signals=[number], to_group=True)
        )

    ended = run_cases(cases)

    for case, code, end in zip(cases, codes.values(), ended, strict=True):
        finished = Finished(end.code, "", end.err)
        assert_stopped(finished, case.folder / "runs" / "x", code, 3)
        assert end.seconds < 5
    resumed = segtrain(*command, "--output", tmp_path / "SIGUSR1" / "runs")
    assert resumed.code == 0, resumed.err
    assert_same_training(tmp_path / "SIGUSR1" / "runs" / "x", straight(arguments))


def signalled_from_the_start(worker: int) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    _BEGIN_WORKER(worker)


_BEGIN_WORKER = begin_worker


def signal_everybody() -> None:
    """As schedulers do that know all processes of a job, whatever their groups are."""
    for child in multiprocessing.active_children():
        os.kill(int(child.pid or 0), signal.SIGTERM)
    time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGTERM)


def test_loader_processes_outlive_a_signal_that_comes_to_them(
    segtrain: Command,
    toy: Path,
    straight: Callable[[list[str]], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At any time, that of their start included: else their parent would die of their death."""
    command = train(toy, PLAIN, "--workers", "2", "--name", "x", "--resume", "auto")
    monkeypatch.setattr("segtrain.data.loading.begin_worker", signalled_from_the_start)
    with monkeypatch.context() as patch:
        after_step(patch.setattr, 3, signal_everybody)
        stopped = segtrain(*command)
    assert_stopped(stopped, Path("runs/x"), 143, 3)

    assert segtrain(*command).code == 0
    assert_same_training(Path("runs/x"), straight(PLAIN))


# --- Stopped elsewhere --------------------------------------------------------------------------


def hit_in_the_midst(patch: pytest.MonkeyPatch, function: str) -> list[float]:
    """Send SIGTERM after the second batch of `evaluate` or `recalibrate`; returns when."""
    real = getattr(segtrain.training.validation, function)
    sent: list[float] = []

    def hooked(*args: Any, on_batch: Callable[[int], object], **kwargs: Any) -> Any:
        calls = 0

        def hit(num_images: int) -> None:
            nonlocal calls
            calls += 1
            if calls == 2:
                sent.append(time.monotonic())
                os.kill(os.getpid(), signal.SIGTERM)
            on_batch(num_images)

        return real(*args, on_batch=hit, **kwargs)

    patch.setattr(segtrain.training.validation, function, hooked)
    return sent


def hit_while_opening_data(patch: pytest.MonkeyPatch) -> list[float]:
    real = segtrain.training.start.open_pictures
    sent: list[float] = []

    def hooked(*args: Any) -> Any:
        if not sent:
            sent.append(time.monotonic())
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    patch.setattr(segtrain.training.start, "open_pictures", hooked)
    return sent


@pytest.mark.parametrize("where", ["evaluate", "recalibrate", "open_pictures"])
def test_a_signal_outside_the_steps_leaves_a_run_that_goes_on_as_if_none_had_come(
    segtrain: Command, toy: Path, straight: Callable[[list[str]], Path], where: str
) -> None:
    # The validation batches are smaller than the pictures: there is something between them.
    arguments = [*UNET, "--epochs", "2", "--batch-size", "2", *sets("train.bn_eval=recalibrate")]
    command = train(toy, arguments, "--name", "x", "--resume", "auto")
    forget_this_process()
    with pytest.MonkeyPatch.context() as patch:
        if where == "open_pictures":
            sent = hit_while_opening_data(patch)
        else:
            sent = hit_in_the_midst(patch, where)
        stopped = segtrain(*command)
        seconds = time.monotonic() - sent[0]

    assert stopped.code == 143, stopped.err
    assert stopped.error_lines == []
    assert "Traceback" not in stopped.err
    assert seconds < 5
    assert leftovers(Path()) == []
    if where == "open_pictures":
        assert not Path("runs").exists(), "nothing has begun"
    else:
        last = load_checkpoint(Path("runs/x/checkpoints/last.pt"))
        assert (last.epoch, last.global_step) == (0, NUM_TRAIN // 2)
        assert not Path("runs/x/metrics.jsonl").exists(), "an epoch counts when it is judged"

    forget_this_process()
    assert segtrain(*command).code == 0
    assert_same_training(Path("runs/x"), straight(arguments))


# --- Damaged checkpoints ------------------------------------------------------------------------


def flip_a_bit(data: bytes) -> bytes:
    """In a tensor: the archive stays in order and torch would load it."""
    changed = bytearray(data)
    changed[len(data) // 2] ^= 0x10
    return bytes(changed)


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda data: data[: len(data) * 2 // 3],
    "empty": lambda data: b"",
    "text": lambda data: b"no checkpoint\n" * 1000,
    "zeros": lambda data: bytes(len(data)),
    "a bit": flip_a_bit,
}


@pytest.fixture(scope="module")
def half_done(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output folder with the run `x`, stopped in its second epoch."""
    output = tmp_path_factory.mktemp("half") / "runs"
    with pytest.MonkeyPatch.context() as patch:
        after_step(patch.setattr, STEPS_AN_EPOCH + 3, kill_self(signal.SIGTERM))
        assert run(train(toy, PLAIN, "--output", str(output), "--name", "x")) == 143
    return output


@pytest.fixture
def half_done_run(half_done: Path, tmp_path: Path) -> Path:
    """A copy of it, in the output folder that is the default here."""
    shutil.copytree(half_done, tmp_path / "runs", symlinks=True)
    return tmp_path / "runs" / "x"


def damage(path: Path, kind: str) -> None:
    path.write_bytes(DAMAGES[kind](path.read_bytes()))


@pytest.mark.parametrize("kind", DAMAGES)
def test_where_the_newest_checkpoint_is_damaged_the_one_before_is_taken(
    segtrain: Command,
    toy: Path,
    straight: Callable[[list[str]], Path],
    half_done_run: Path,
    kind: str,
) -> None:
    last = half_done_run / "checkpoints" / "last.pt"
    previous = half_done_run / "checkpoints" / "previous.pt"
    damage(last, kind)
    before = digests(half_done_run)

    finished = segtrain(*train(toy, PLAIN, "--name", "x"), "--resume", last)
    assert_error(finished, CHECKPOINT, "last.pt")
    assert digests(half_done_run) == before

    forget_this_process()
    finished = segtrain(*train(toy, PLAIN, "--name", "x", "--resume", "auto"))

    assert finished.code == 0, finished.err
    assert finished.error_lines == []
    warnings = [line for line in finished.err.splitlines() if line.startswith("warning:")]
    assert str(last) in warnings[0]
    assert f"going on with {previous}, the one before" in warnings[0]
    assert "kept as" in warnings[1]
    assert digests(half_done_run)["damaged.pt"] == before["last.pt"]
    assert f"continuing {previous} after epoch 1" in finished.out
    assert_same_training(half_done_run, straight(PLAIN))
    # The damaged file has not taken the place of the good one on the way.
    load_checkpoint(previous)


def test_a_missing_newest_checkpoint_is_no_obstacle(
    segtrain: Command, toy: Path, straight: Callable[[list[str]], Path], half_done_run: Path
) -> None:
    (half_done_run / "checkpoints" / "last.pt").unlink()

    finished = segtrain(*train(toy, PLAIN, "--name", "x", "--resume", "auto"))

    assert finished.code == 0, finished.err
    assert "previous.pt after epoch 1" in finished.out
    assert_same_training(half_done_run, straight(PLAIN))


def test_where_both_are_damaged_nothing_is_touched_and_both_are_named(
    segtrain: Command, toy: Path, half_done_run: Path
) -> None:
    for name in ("last.pt", "previous.pt"):
        damage(half_done_run / "checkpoints" / name, "a bit")
    before = digests(half_done_run)

    finished = segtrain(*train(toy, PLAIN, "--name", "x", "--resume", "auto"))

    assert_error(finished, CHECKPOINT, "last.pt", "previous.pt")
    assert digests(half_done_run) == before


def test_the_good_checkpoint_outlives_a_kill_in_the_first_save_beside_a_damaged_one(
    segtrain: Command, toy: Path, half_done_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The damaged last.pt must never become the previous one."""
    damage(half_done_run / "checkpoints" / "last.pt", "a bit")
    real = Path.replace
    seen: list[bool] = []

    def replace(self: Path, target: Path) -> Path:
        moved = real(self, target)
        if target.name in {"last.pt", "previous.pt"}:
            seen.append(any(map(loads, (half_done_run / "checkpoints").glob("[lp]*.pt"))))
        return moved

    monkeypatch.setattr(Path, "replace", replace)
    assert segtrain(*train(toy, PLAIN, "--name", "x", "--resume", "auto")).code == 0

    assert len(seen) > 1
    assert all(seen)


def loads(path: Path) -> bool:
    from segtrain.errors import CheckpointError

    try:
        load_checkpoint(path)
    except CheckpointError:
        return False
    return True


@pytest.mark.parametrize(
    "changes",
    [
        {"images_drawn": "many"},
        {"stage": 1},
        {"stage": -1},
        {"stage": [0]},
        {"best_iou": 1},
        {"history": {"epoch": 1}},
        {"history": [{"epoch": 1, "stage": 1}]},
        {"history": []},
        {"tally": [1.0, 2.0]},
        {"tally": "none"},
        {"optimizer": {}},
        {"optimizer": {"state": {0: 5}, "param_groups": []}},
        {"scaler": 5},
        {"num_processes": "two"},
    ],
    ids=str,
)
def test_a_forged_training_state_is_refused(
    segtrain: Command, half_done_run: Path, changes: dict[str, Any]
) -> None:
    """Its checksum is right, so only its meaning can give it away."""
    last = half_done_run / "checkpoints" / "last.pt"
    checkpoint = load_checkpoint(last)
    save_checkpoint(last, replace(checkpoint, training={**checkpoint.training, **changes}))
    before = digests(half_done_run)

    finished = segtrain("train", "--resume", half_done_run, "--precision", "fp16")

    assert_error(finished, CHECKPOINT, "last.pt", "start a new run")
    assert digests(half_done_run) == before


# --- What is asked for on resuming --------------------------------------------------------------


def test_nothing_to_resume_is_an_error_where_a_path_is_given(
    segtrain: Command, toy: Path, tmp_path: Path
) -> None:
    (tmp_path / "runs" / "empty").mkdir(parents=True)

    finished = segtrain(*train(toy, PLAIN), "--resume", "runs/empty")

    assert_error(finished, CHECKPOINT, "runs/empty", "--resume auto")
    assert list((tmp_path / "runs" / "empty").iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        (["--model", "fc_densenet56"], ["model.name"]),
        (["--seed", "7"], ["train.seed"]),
        (sets("loss.name=focal", "loss.focal_gamma=3"), ["loss.name", "loss.focal_gamma"]),
        (["--image-size", "64", *sets("model.depth=3")], ["data.image_size", "model.depth"]),
        (["--config", "stages.yaml"], ["stages"]),
    ],
)
def test_another_experiment_is_refused_key_by_key(
    segtrain: Command, half_done_run: Path, changes: list[str], keys: list[str]
) -> None:
    before = digests(half_done_run)

    finished = segtrain("train", "--resume", half_done_run, *changes)

    assert_error(finished, CHECKPOINT, *keys, "start a new run")
    assert digests(half_done_run) == before


def test_what_is_safe_to_change_is_taken_and_said(segtrain: Command, half_done_run: Path) -> None:
    finished = segtrain(
        *("train", "--resume", half_done_run, "--lr", "2e-4", "--epochs", "3", "--workers", "1")
    )

    assert finished.code == 0, finished.err
    assert "changed from here on: data.workers, optim.lr, train.epochs" in finished.out
    rows = metrics_rows(half_done_run)
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert rows[0]["lr"] > 5e-4 > 2e-4 > rows[1]["lr"]
    config = load_checkpoint(half_done_run / "checkpoints" / "last.pt").config
    assert (config.data.workers, config.optim.lr, config.train.epochs) == (1, 2e-4, 3)


@pytest.mark.parametrize("precisions", [("fp32", "fp16", "fp32"), ("bf16", "fp32")])
def test_another_precision_goes_on_with_a_fresh_scaler(
    segtrain: Command, toy: Path, precisions: tuple[str, ...]
) -> None:
    # The option once: an epoch in each of the precisions.
    arguments = [a for a in PLAIN if a not in {"--precision", "fp32", "--epochs", "2"}]
    last = Path("runs/x/checkpoints/last.pt")
    before = None
    for epoch, precision in enumerate(precisions, 1):
        command = train(toy, arguments, "--name", "x", "--resume", "auto")
        finished = segtrain(*command, "--precision", precision, "--epochs", str(epoch))

        assert finished.code == 0, finished.err
        assert f"precision {precision}" in finished.out
        warned = "gradient scaler starts afresh" in finished.err
        assert warned == (precision == "fp16" and before is not None)
        assert ("changed from here on: train.epochs, train.precision" in finished.out) == (
            before is not None
        )
        saved = load_checkpoint(last)
        assert bool(saved.training["scaler"]) == (precision == "fp16")
        assert saved.epoch == epoch
        before = precision


def change_training(run_folder: Path, **changes: Any) -> None:
    """Let last.pt say something else."""
    last = run_folder / "checkpoints" / "last.pt"
    loaded = load_checkpoint(last)
    save_checkpoint(last, replace(loaded, training={**loaded.training, **changes}))


@pytest.mark.parametrize("other", [False, True])
def test_the_best_of_other_validation_pictures_is_beaten_by_none_of_these(
    segtrain: Command, half_done_run: Path, toy: Path, tmp_path: Path, other: bool
) -> None:
    change_training(half_done_run, best_iou=0.999, best_epoch=1)
    data = make_toy_coco(tmp_path / "other", num_train=24, num_val=3) if other else toy

    finished = segtrain("train", "--resume", half_done_run, "--data", data, "--epochs", "2")

    assert finished.code == 0, finished.err
    assert ("the best IoU is looked for anew" in finished.err) == other
    saved = load_checkpoint(half_done_run / "checkpoints" / "last.pt")
    assert saved.training["best_epoch"] == (2 if other else 1)
    assert saved.training["best_iou"] == (saved.metrics["val/person_iou"] if other else 0.999)


@pytest.mark.parametrize(
    ("keep", "warned"),
    [
        ((), "steps of 8 images on 2 processes, and on 1 of 4; --set train.accumulation_steps=2"),
        (sets("train.accumulation_steps=2"), None),
        (("--batch-size", "8"), None),
    ],
)
def test_fewer_processes_are_told_how_to_keep_the_steps(
    segtrain: Command, half_done_run: Path, keep: tuple[str, ...], warned: str | None
) -> None:
    change_training(half_done_run, num_processes=2, images_drawn=4)

    finished = segtrain("train", "--resume", half_done_run, *keep)

    assert finished.code == 0, finished.err
    assert (warned is None) == ("steps of" not in finished.err)
    assert warned is None or warned in finished.err
    saved = load_checkpoint(half_done_run / "checkpoints" / "last.pt")
    assert saved.training["num_processes"] == 1
    # Four pictures each of two are eight of the epoch's 24.
    assert saved.global_step == STEPS_AN_EPOCH + 3 + (4 if warned else 2)


def test_a_run_of_an_earlier_version_does_not_say_how_many_processes_it_had(
    segtrain: Command, half_done_run: Path
) -> None:
    last = half_done_run / "checkpoints" / "last.pt"
    loaded = load_checkpoint(last)
    training = {key: value for key, value in loaded.training.items() if key != "num_processes"}
    save_checkpoint(last, replace(loaded, training=training))

    finished = segtrain("train", "--resume", half_done_run)

    assert finished.code == 0, finished.err
    assert "steps of" not in finished.err
