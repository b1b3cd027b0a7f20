"""A run that was stopped and resumed equals an uninterrupted run, bit for bit."""

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
from helpers.coco import make_toy_coco
from helpers.command import Command, Finished
from helpers.interruptions import (
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
import segtrain.training.setup
import segtrain.training.validation
from segtrain.checkpoint import load_checkpoint, save_checkpoint
from segtrain.cli.main import run
from segtrain.data.loader import Batches
from segtrain.data.workers import begin_worker
from segtrain.runtime.devices import resolve_device

pytestmark = pytest.mark.usefixtures("one_thread")

CHECKPOINT = 4
NUM_TRAIN, STEPS_PER_EPOCH = 24, 6
ALL = ("--image-size", "48", "--precision", "fp32", "--device", "cpu")


def set_options(*settings: str) -> list[str]:
    """The arguments `--set SETTING` for each setting."""
    return [argument for setting in settings for argument in ("--set", setting)]


UNET = [*ALL, *set_options("model.base_channels=4", "model.depth=2", "optim.warmup_steps=3")]
# With dropout, every step draws random numbers.
TIRAMISU = [
    *(*ALL, "--model", "fc_densenet56", "--epochs", "2", "--batch-size", "4"),
    *set_options("model.down_blocks=[1]", "model.up_blocks=[1]", "model.bottleneck=1"),
]
PLAIN = [*UNET, "--epochs", "2", "--batch-size", "4"]
# Name → arguments and number of optimizer steps. In each, a step depends on another part of the
# state besides the weights.
EXPERIMENTS: dict[str, tuple[list[str], int]] = {
    "dropout": (TIRAMISU, 12),
    "ema": (
        [
            *(*UNET, "--epochs", "3", "--batch-size", "4"),
            *set_options(
                "train.ema_decay=0.9", "train.accumulation_steps=2", "optim.schedule=cosine"
            ),
            *set_options("optim.name=adamw", "train.bn_eval=recalibrate"),
        ],
        9,
    ),
    "plateau": (
        [
            *(*UNET, "--epochs", "6", "--batch-size", "12", "--lr", "1e-5"),
            *set_options("optim.schedule=plateau", "optim.plateau_patience=1", "train.patience=3"),
        ],
        8,
    ),
    "stages": ([*TIRAMISU, "--epochs", "1", "--config", "stages.yaml"], 14),
    "whole": (
        [
            *(*UNET, "--epochs", "2", "--batch-size", "1"),
            *set_options("data.whole=true", "train.accumulation_steps=4", "loss.name=border_ce"),
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
# Stop in the second stage.
FIRST_STOP = {"stages": STEPS_PER_EPOCH + 1}


def keep_last_epochs(arguments: list[str]) -> list[str]:
    """Drop all but the last `--epochs`: the command line accepts an option once."""
    indices = [index for index, argument in enumerate(arguments) if argument == "--epochs"]
    for index in reversed(indices[:-1]):
        arguments = arguments[:index] + arguments[index + 2 :]
    return arguments


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    return make_toy_coco(folder / "coco", num_train=NUM_TRAIN, num_val=4)


@pytest.fixture(autouse=True)
def _stages(tmp_path: Path) -> None:
    (tmp_path / "stages.yaml").write_text(STAGES)


@pytest.fixture(scope="module")
def uninterrupted(
    toy: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[list[str]], Path]:
    """Returns the uninterrupted run of an experiment; each is trained once."""
    runs: dict[tuple[str, ...], Path] = {}

    def get_run(arguments: list[str]) -> Path:
        arguments = keep_last_epochs(arguments)
        key = tuple(arguments)
        if key not in runs:
            output = tmp_path_factory.mktemp("uninterrupted")
            assert run(train(toy, arguments, "--output", str(output), "--name", "s")) == 0
            runs[key] = output / "s"
        return runs[key]

    return get_run


def train(toy: Path, arguments: list[str], *more: str) -> list[str]:
    """The command line of a training."""
    arguments = keep_last_epochs(arguments)
    workers = [] if "--workers" in more else ["--workers", "0"]
    return ["train", "--data", str(toy), *arguments, *workers, *more]


def reset_random_state() -> None:
    """Seed all generators randomly, as a new process does not have the state of the old one."""
    noise = int.from_bytes(os.urandom(4), "little")
    random.seed(noise)
    np.random.seed(noise)  # noqa: NPY002, the generator of a careless augmentation
    torch.manual_seed(noise)


def stop_after(
    segtrain: Command, command: list[str], step: int, number: int = signal.SIGTERM
) -> Finished:
    """Run `command` and send a signal right after its step `step`."""
    reset_random_state()
    with pytest.MonkeyPatch.context() as patch:
        after_step(patch.setattr, step, kill_self(number))
        return segtrain(*command)


def assert_stopped(finished: Finished, run_folder: Path, code: int, step: int) -> None:
    assert finished.code == code, finished.err
    assert f"the state after step {step} is saved; --resume auto continues" in finished.err
    assert finished.error_lines == []
    assert "Traceback" not in finished.err
    assert load_checkpoint(run_folder / "checkpoints" / "last.pt").global_step == step
    assert leftovers(run_folder.parent) == []


def assert_error(finished: Finished, code: int, *expected: str) -> None:
    assert finished.code == code, finished.err
    [line] = finished.error_lines
    assert len(line) <= 200
    assert "Traceback" not in finished.err
    for text in expected:
        assert text in line


# --- Stopped within an epoch --------------------------------------------------------------------


def stop_and_resume(
    segtrain: Command, toy: Path, name: str, stops: list[int], workers: str
) -> Path:
    """Stop an experiment after each of `stops`, let it finish, and return its run folder."""
    arguments, num_steps = EXPERIMENTS[name]
    command = train(toy, arguments, "--workers", workers, "--name", "stopped", "--resume", "auto")
    folder = Path("runs/stopped")
    num_done = 0
    for stop in stops:
        finished = stop_after(segtrain, command, stop - num_done)
        assert_stopped(finished, folder, 143, stop)
        num_done = stop
    reset_random_state()
    finished = segtrain(*command)
    assert finished.code == 0, finished.err
    assert load_checkpoint(folder / "checkpoints" / "last.pt").global_step == num_steps
    return folder


def random_stops(name: str, seed: int) -> list[int]:
    """Two random steps to stop after."""
    rng = random.Random(f"{name} {seed}")
    steps = range(FIRST_STOP.get(name, 1), EXPERIMENTS[name][1] + 1)
    return sorted(rng.sample(steps, 2))


@pytest.mark.parametrize(
    ("name", "workers"),
    [*((name, "0") for name in EXPERIMENTS), ("dropout", "2")],
)
def test_a_run_stopped_twice_at_random_steps_equals_an_uninterrupted_one(
    segtrain: Command,
    toy: Path,
    uninterrupted: Callable[[list[str]], Path],
    name: str,
    workers: str,
) -> None:
    expected = uninterrupted(EXPERIMENTS[name][0])

    folder = stop_and_resume(segtrain, toy, name, random_stops(name, 0), workers)

    assert_same_training(folder, expected)


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", "2"])
@pytest.mark.parametrize("seed", range(1, 4))
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_more_random_steps(
    segtrain: Command,
    toy: Path,
    uninterrupted: Callable[[list[str]], Path],
    name: str,
    seed: int,
    workers: str,
) -> None:
    expected = uninterrupted(EXPERIMENTS[name][0])

    folder = stop_and_resume(segtrain, toy, name, random_stops(name, seed), workers)

    assert_same_training(folder, expected)


def unseeded_steps(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(segtrain.training.epoch, "seed_step", lambda *_: None)


def restarted_epoch(patch: pytest.MonkeyPatch) -> None:
    real = Batches.set_epoch
    patch.setattr(Batches, "set_epoch", lambda self, epoch, *, samples_seen=0: real(self, epoch))


def forgotten_optimizer(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("segtrain.training.state._load_optimizer", lambda optimizer, saved: None)


def forgotten_ema(patch: pytest.MonkeyPatch) -> None:
    """It starts again as a copy of the weights."""
    patch.setattr(torch.nn.Module, "load_state_dict", load_all_but_ema)


def load_all_but_ema(
    self: torch.nn.Module, state: dict[str, Any], strict: bool = True, assign: bool = False
) -> None:
    if assign:
        _LOAD_STATE_DICT(self, state, strict=strict, assign=True)


_LOAD_STATE_DICT = torch.nn.Module.load_state_dict


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("dropout", unseeded_steps),
        ("dropout", restarted_epoch),
        ("ema", forgotten_optimizer),
        ("ema", forgotten_ema),
    ],
)
def test_the_comparison_fails_if_resuming_forgets_a_part_of_the_state(
    segtrain: Command,
    toy: Path,
    uninterrupted: Callable[[list[str]], Path],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    fault: Callable[[pytest.MonkeyPatch], None],
) -> None:
    """The tests above can fail: they do without one part of what is saved or seeded."""
    expected = uninterrupted(EXPERIMENTS[name][0])
    fault(monkeypatch)

    with pytest.raises(AssertionError):
        assert_same_training(stop_and_resume(segtrain, toy, name, [5, 8], "0"), expected)


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), (signal.SIGUSR1, 143), (signal.SIGINT, 130)],
    ids=["TERM", "USR1", "INT"],
)
def test_a_signal_within_an_epoch_stops_after_the_current_step(
    segtrain: Command,
    toy: Path,
    uninterrupted: Callable[[list[str]], Path],
    number: int,
    code: int,
) -> None:
    arguments = [*PLAIN, *set_options("train.ema_decay=0.9")]
    command = train(toy, arguments, "--name", "x", "--resume", "auto")

    stopped = stop_after(segtrain, command, STEPS_PER_EPOCH + 2, number)
    assert_stopped(stopped, Path("runs/x"), code, STEPS_PER_EPOCH + 2)
    reset_random_state()
    resumed = segtrain(*command)

    assert resumed.code == 0, resumed.err
    assert f"within the next at step {STEPS_PER_EPOCH + 2}" in resumed.out
    assert_same_training(Path("runs/x"), uninterrupted(arguments))


@pytest.mark.slow
def test_a_signal_to_the_process_group_acts_like_one_to_the_process(
    segtrain: Command, toy: Path, uninterrupted: Callable[[list[str]], Path], tmp_path: Path
) -> None:
    """Loader processes also belong to the group."""
    arguments = [*PLAIN, *set_options("train.ema_decay=0.9")]
    command = train(toy, arguments, "--workers", "2", "--name", "x", "--resume", "auto")
    codes = {signal.SIGUSR1: 143, signal.SIGINT: 130}
    cases = []
    for number in codes:
        folder = tmp_path / number.name
        folder.mkdir()
        cases.append(
            Case(folder=folder, arguments=command, step=3, signals=[number], to_group=True)
        )

    results = run_cases(cases)

    for case, code, result in zip(cases, codes.values(), results, strict=True):
        finished = Finished(result.code, "", result.err)
        assert_stopped(finished, case.folder / "runs" / "x", code, 3)
        assert result.seconds < 5
    resumed = segtrain(*command, "--output", tmp_path / "SIGUSR1" / "runs")
    assert resumed.code == 0, resumed.err
    assert_same_training(tmp_path / "SIGUSR1" / "runs" / "x", uninterrupted(arguments))


def signaled_at_its_start(worker: int) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    _BEGIN_WORKER(worker)


_BEGIN_WORKER = begin_worker


def signal_all_processes() -> None:
    """Some schedulers signal all processes of a job, whatever their groups."""
    for child in multiprocessing.active_children():
        os.kill(int(child.pid or 0), signal.SIGTERM)
    time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGTERM)


def test_loader_processes_survive_a_signal(
    segtrain: Command,
    toy: Path,
    uninterrupted: Callable[[list[str]], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At any time, also while they start: the parent process fails if a loader process dies."""
    command = train(toy, PLAIN, "--workers", "2", "--name", "x", "--resume", "auto")
    monkeypatch.setattr("segtrain.data.loader.begin_worker", signaled_at_its_start)
    with monkeypatch.context() as patch:
        after_step(patch.setattr, 3, signal_all_processes)
        stopped = segtrain(*command)
    assert_stopped(stopped, Path("runs/x"), 143, 3)

    assert segtrain(*command).code == 0
    assert_same_training(Path("runs/x"), uninterrupted(PLAIN))


# --- Stopped elsewhere --------------------------------------------------------------------------


def signal_during(patch: pytest.MonkeyPatch, function: str) -> list[float]:
    """Send SIGTERM after the first batch of `function`; returns a list with the time."""
    real = getattr(segtrain.training.validation, function)
    sent: list[float] = []

    def hooked(*args: Any, on_batch: Callable[[int], object], **kwargs: Any) -> Any:
        def send_signal(num_images: int) -> None:
            if not sent:
                sent.append(time.monotonic())
                os.kill(os.getpid(), signal.SIGTERM)
            on_batch(num_images)

        return real(*args, on_batch=send_signal, **kwargs)

    patch.setattr(segtrain.training.validation, function, hooked)
    return sent


def signal_while_opening_data(patch: pytest.MonkeyPatch) -> list[float]:
    real = segtrain.training.setup.open_selection
    sent: list[float] = []

    def hooked(*args: Any) -> Any:
        if not sent:
            sent.append(time.monotonic())
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    patch.setattr(segtrain.training.setup, "open_selection", hooked)
    return sent


@pytest.mark.parametrize("where", ["evaluate_batches", "recalibrate", "open_selection"])
def test_a_run_signaled_outside_the_steps_continues_like_an_uninterrupted_one(
    segtrain: Command, toy: Path, uninterrupted: Callable[[list[str]], Path], where: str
) -> None:
    # Two validation batches, so the signal arrives between them.
    arguments = [
        *UNET,
        "--epochs",
        "2",
        "--batch-size",
        "2",
        *set_options("train.bn_eval=recalibrate"),
    ]
    command = train(toy, arguments, "--name", "x", "--resume", "auto")
    reset_random_state()
    with pytest.MonkeyPatch.context() as patch:
        if where == "open_selection":
            sent = signal_while_opening_data(patch)
        else:
            sent = signal_during(patch, where)
        stopped = segtrain(*command)
        seconds = time.monotonic() - sent[0]

    assert stopped.code == 143, stopped.err
    assert stopped.error_lines == []
    assert "Traceback" not in stopped.err
    assert seconds < 5
    assert leftovers(Path()) == []
    if where == "open_selection":
        assert not Path("runs").exists(), "training has not started"
    else:
        last = load_checkpoint(Path("runs/x/checkpoints/last.pt"))
        assert (last.epoch, last.global_step) == (0, NUM_TRAIN // 2)
        assert not Path("runs/x/metrics.jsonl").exists(), "an epoch is complete after validation"

    reset_random_state()
    assert segtrain(*command).code == 0
    assert_same_training(Path("runs/x"), uninterrupted(arguments))


# --- Damaged checkpoints ------------------------------------------------------------------------


def flip_a_bit(data: bytes) -> bytes:
    """Flip a bit of a tensor: the archive stays valid, and torch would load it."""
    damaged = bytearray(data)
    damaged[len(data) // 2] ^= 0x10
    return bytes(damaged)


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda data: data[: len(data) * 2 // 3],
    "empty": lambda data: b"",
    "text": lambda data: b"no checkpoint\n" * 1000,
    "zeros": lambda data: bytes(len(data)),
    "a bit": flip_a_bit,
}


@pytest.fixture(scope="module")
def partial_runs(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output folder with a run `x` that was stopped in its second epoch."""
    output = tmp_path_factory.mktemp("half") / "runs"
    with pytest.MonkeyPatch.context() as patch:
        after_step(patch.setattr, STEPS_PER_EPOCH + 3, kill_self(signal.SIGTERM))
        assert run(train(toy, PLAIN, "--output", str(output), "--name", "x")) == 143
    return output


@pytest.fixture
def partial_run(partial_runs: Path, tmp_path: Path) -> Path:
    """A copy of it in the default output folder."""
    shutil.copytree(partial_runs, tmp_path / "runs", symlinks=True)
    return tmp_path / "runs" / "x"


def damage(path: Path, kind: str) -> None:
    path.write_bytes(DAMAGES[kind](path.read_bytes()))


@pytest.mark.parametrize("kind", DAMAGES)
def test_if_the_newest_checkpoint_is_damaged_the_run_continues_from_the_previous_one(
    segtrain: Command,
    toy: Path,
    uninterrupted: Callable[[list[str]], Path],
    partial_run: Path,
    kind: str,
) -> None:
    last = partial_run / "checkpoints" / "last.pt"
    previous = partial_run / "checkpoints" / "previous.pt"
    damage(last, kind)
    before = digests(partial_run)

    finished = segtrain(*train(toy, PLAIN, "--name", "x"), "--resume", last)
    assert_error(finished, CHECKPOINT, "last.pt")
    assert digests(partial_run) == before

    reset_random_state()
    finished = segtrain(*train(toy, PLAIN, "--name", "x", "--resume", "auto"))

    assert finished.code == 0, finished.err
    assert finished.error_lines == []
    warnings = [line for line in finished.err.splitlines() if line.startswith("warning:")]
    assert str(last) in warnings[0]
    assert f"continuing with the previous checkpoint, {previous}" in warnings[0]
    assert "kept as" in warnings[1]
    assert digests(partial_run)["damaged.pt"] == before["last.pt"]
    assert f"continuing from {previous} after epoch 1" in finished.out
    assert_same_training(partial_run, uninterrupted(PLAIN))
    # The damaged file has not replaced the good one.
    load_checkpoint(previous)


def test_if_the_newest_checkpoint_is_missing_the_run_continues_from_the_previous_one(
    segtrain: Command, toy: Path, uninterrupted: Callable[[list[str]], Path], partial_run: Path
) -> None:
    (partial_run / "checkpoints" / "last.pt").unlink()

    finished = segtrain(*train(toy, PLAIN, "--name", "x", "--resume", "auto"))

    assert finished.code == 0, finished.err
    assert "previous.pt after epoch 1" in finished.out
    assert_same_training(partial_run, uninterrupted(PLAIN))


def test_if_both_checkpoints_are_damaged_no_file_changes_and_both_are_named(
    segtrain: Command, toy: Path, partial_run: Path
) -> None:
    for name in ("last.pt", "previous.pt"):
        damage(partial_run / "checkpoints" / name, "a bit")
    before = digests(partial_run)

    finished = segtrain(*train(toy, PLAIN, "--name", "x", "--resume", "auto"))

    assert_error(finished, CHECKPOINT, "last.pt", "previous.pt")
    assert digests(partial_run) == before


def test_a_kill_in_the_first_save_after_a_damaged_checkpoint_does_not_lose_the_good_one(
    segtrain: Command, toy: Path, partial_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The damaged last.pt must never become previous.pt."""
    damage(partial_run / "checkpoints" / "last.pt", "a bit")
    real = Path.replace
    has_good_checkpoint: list[bool] = []

    def replace(self: Path, target: Path) -> Path:
        result = real(self, target)
        if target.name in {"last.pt", "previous.pt"}:
            paths = (partial_run / "checkpoints").glob("[lp]*.pt")
            has_good_checkpoint.append(any(map(is_loadable, paths)))
        return result

    monkeypatch.setattr(Path, "replace", replace)
    assert segtrain(*train(toy, PLAIN, "--name", "x", "--resume", "auto")).code == 0

    assert len(has_good_checkpoint) > 1
    assert all(has_good_checkpoint)


def is_loadable(path: Path) -> bool:
    from segtrain.errors import CheckpointError

    try:
        load_checkpoint(path)
    except CheckpointError:
        return False
    return True


@pytest.mark.parametrize(
    "changes",
    [
        {"samples_seen": "many"},
        {"stage": 1},
        {"stage": -1},
        {"stage": [0]},
        {"best_iou": 1},
        {"history": {"epoch": 1}},
        {"history": [{"epoch": 1, "stage": 1}]},
        {"history": []},
        {"step_stats": [1.0, 2.0]},
        {"step_stats": "none"},
        {"optimizer": {}},
        {"optimizer": {"state": {0: 5}, "param_groups": []}},
        {"scaler": 5},
        {"num_processes": "two"},
    ],
    ids=str,
)
def test_an_invalid_training_state_is_rejected(
    segtrain: Command, partial_run: Path, changes: dict[str, Any]
) -> None:
    """Its checksum is correct, so only its values can reveal it."""
    last = partial_run / "checkpoints" / "last.pt"
    checkpoint = load_checkpoint(last)
    save_checkpoint(last, replace(checkpoint, training={**checkpoint.training, **changes}))
    before = digests(partial_run)

    finished = segtrain("train", "--resume", partial_run, "--precision", "fp16")

    assert_error(finished, CHECKPOINT, "last.pt", "start a new run")
    assert digests(partial_run) == before


# --- Options when resuming ----------------------------------------------------------------------


def test_resuming_from_an_empty_folder_is_an_error(
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
        (set_options("loss.name=focal", "loss.focal_gamma=3"), ["loss.name", "loss.focal_gamma"]),
        (["--image-size", "64", *set_options("model.depth=3")], ["data.image_size", "model.depth"]),
        (["--config", "stages.yaml"], ["stages"]),
    ],
)
def test_options_that_change_the_experiment_are_rejected_by_name(
    segtrain: Command, partial_run: Path, changes: list[str], keys: list[str]
) -> None:
    before = digests(partial_run)

    finished = segtrain("train", "--resume", partial_run, *changes)

    assert_error(finished, CHECKPOINT, *keys, "start a new run")
    assert digests(partial_run) == before


def test_options_that_are_safe_to_change_are_applied_and_logged(
    segtrain: Command, partial_run: Path
) -> None:
    finished = segtrain(
        *("train", "--resume", partial_run, "--lr", "2e-4", "--epochs", "3", "--workers", "1")
    )

    assert finished.code == 0, finished.err
    assert "changed from here on: data.workers, optim.lr, train.epochs" in finished.out
    rows = metrics_rows(partial_run)
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert rows[0]["lr"] > 5e-4 > 2e-4 > rows[1]["lr"]
    config = load_checkpoint(partial_run / "checkpoints" / "last.pt").config
    assert (config.data.workers, config.optim.lr, config.train.epochs) == (1, 2e-4, 3)


@pytest.mark.parametrize("precisions", [("fp32", "fp16", "fp32"), ("bf16", "fp32")])
def test_after_a_change_of_precision_the_scaler_starts_over(
    segtrain: Command, toy: Path, precisions: tuple[str, ...]
) -> None:
    # One epoch in each of the precisions.
    arguments = [a for a in PLAIN if a not in {"--precision", "fp32", "--epochs", "2"}]
    last = Path("runs/x/checkpoints/last.pt")
    before = None
    for epoch, precision in enumerate(precisions, 1):
        command = train(toy, arguments, "--name", "x", "--resume", "auto")
        finished = segtrain(*command, "--precision", precision, "--epochs", str(epoch))

        assert finished.code == 0, finished.err
        assert f"precision {precision}" in finished.out
        warned = "gradient scaler starts over" in finished.err
        assert warned == (precision == "fp16" and before is not None)
        assert ("changed from here on: train.epochs, train.precision" in finished.out) == (
            before is not None
        )
        saved = load_checkpoint(last)
        assert bool(saved.training["scaler"]) == (precision == "fp16")
        assert saved.epoch == epoch
        before = precision


def change_training(run_folder: Path, **changes: Any) -> None:
    """Change values of the training state in last.pt."""
    last = run_folder / "checkpoints" / "last.pt"
    checkpoint = load_checkpoint(last)
    save_checkpoint(last, replace(checkpoint, training={**checkpoint.training, **changes}))


@pytest.mark.parametrize("has_changed", [False, True])
def test_if_the_validation_images_change_the_search_for_the_best_iou_starts_over(
    segtrain: Command, partial_run: Path, toy: Path, tmp_path: Path, has_changed: bool
) -> None:
    change_training(partial_run, best_iou=0.999, best_epoch=1)
    data = make_toy_coco(tmp_path / "other", num_train=24, num_val=3) if has_changed else toy

    finished = segtrain("train", "--resume", partial_run, "--data", data, "--epochs", "2")

    assert finished.code == 0, finished.err
    assert ("the search for the best IoU starts over" in finished.err) == has_changed
    saved = load_checkpoint(partial_run / "checkpoints" / "last.pt")
    assert saved.training["best_epoch"] == (2 if has_changed else 1)
    assert saved.training["best_iou"] == (saved.metrics["val/person_iou"] if has_changed else 0.999)


@pytest.mark.parametrize(
    ("options", "warning"),
    [
        (
            (),
            "steps of 8 images on 2 processes, and takes steps of 4 on 1; "
            "--set train.accumulation_steps=2 keeps the step size",
        ),
        (set_options("train.accumulation_steps=2"), None),
        (("--batch-size", "8"), None),
    ],
)
def test_with_fewer_processes_the_warning_names_the_option_that_keeps_the_step_size(
    segtrain: Command, partial_run: Path, options: tuple[str, ...], warning: str | None
) -> None:
    change_training(partial_run, num_processes=2, samples_seen=4)

    finished = segtrain("train", "--resume", partial_run, *options)

    assert finished.code == 0, finished.err
    assert (warning is None) == ("steps of" not in finished.err)
    assert warning is None or warning in finished.err
    saved = load_checkpoint(partial_run / "checkpoints" / "last.pt")
    assert saved.training["num_processes"] == 1
    # Two processes with four images each have seen eight of the 24 images of the epoch.
    assert saved.global_step == STEPS_PER_EPOCH + 3 + (4 if warning else 2)


def test_a_run_continues_on_its_own_device(
    segtrain: Command, partial_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without --device: auto might choose another one."""
    requested: list[str] = []

    def record(name: str, local_rank: int | None = None) -> torch.device:
        requested.append(name)
        return resolve_device(name, local_rank)

    monkeypatch.setattr("segtrain.training.setup.resolve_device", record)

    finished = segtrain("train", "--resume", partial_run)

    assert finished.code == 0, finished.err
    assert requested == ["cpu"]
