"""Whole commands on a GPU: however it is named, stopped, resumed, and with processes that die."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import TOY_TRAINING, Command
from interruptions import metrics_rows, session_members

from segtrain.checkpoint import load_checkpoint

pytestmark = pytest.mark.gpu

PROJECT = Path(__file__).parents[1]
NETWORK = TOY_TRAINING[: TOY_TRAINING.index("--workers")]
# Loader processes only in trainings of their own: a fork of pytest's many threads is a warning.
TOY = (*NETWORK, "--workers", "0")
LAST = Path("runs/toy/checkpoints/last.pt")


@pytest.mark.parametrize("device", ["auto", "cuda", "cuda:0"])
def test_training_starts_however_the_gpu_is_named(
    segtrain: Command, toy_coco: Path, device: str
) -> None:
    common = ["--data", toy_coco, *TOY, "--epochs", "1", "--name", "toy"]

    finished = segtrain("train", *common, "--device", device)

    assert finished.code == 0, finished.err
    assert "device: cuda:0 (" in finished.out


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_resumed_run_ends_where_a_straight_one_does(
    segtrain: Command, toy_coco: Path, precision: str
) -> None:
    """Not to the last bit: a GPU adds up in no fixed order."""
    common = ["train", "--data", toy_coco, *TOY, "--device", "cuda", "--precision", precision]
    common += ["--set", "train.ema_decay=0.9"]
    assert segtrain(*common, "--epochs", "3", "--name", "straight").code == 0
    for epochs in ("1", "3"):
        finished = segtrain(*common, "--epochs", epochs, "--name", "toy", "--resume", "auto")
        assert finished.code == 0, finished.err
    straight = Path("runs/straight")

    for ours, theirs in zip(metrics_rows(LAST.parents[1]), metrics_rows(straight), strict=True):
        assert (ours["global_step"], ours["lr"]) == (theirs["global_step"], theirs["lr"])
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], abs=0.02)
    ours, theirs = (
        load_checkpoint(run / "checkpoints/last.pt") for run in (Path("runs/toy"), straight)
    )
    assert ours.training["scaler"] == theirs.training["scaler"]
    assert bool(ours.training["scaler"]) == (precision == "fp16")


@pytest.mark.parametrize("optimizer", ["rmsprop", "sgd", "adam", "adamw"])
def test_a_run_moves_to_the_cpu_and_back(segtrain: Command, toy_coco: Path, optimizer: str) -> None:
    common = ["train", "--data", toy_coco, *TOY, "--name", "toy", "--resume", "auto"]
    common += ["--set", f"optim.name={optimizer}", "--lr", "1e-4"]
    places = [("cuda", "fp16"), ("cpu", "fp32"), ("cuda", "fp16"), ("cuda", "bf16")]
    for epoch, (device, precision) in enumerate(places, 1):
        place = ["--device", device, "--precision", precision]
        finished = segtrain(*common, *place, "--epochs", str(epoch))

        assert finished.code == 0, finished.err
        assert f"device: {device}" in finished.out
        assert load_checkpoint(LAST).epoch == epoch


def test_evaluation_on_a_gpu_is_that_on_the_cpu(segtrain: Command, trained_run: Path) -> None:
    found: dict[str, dict[str, float]] = {}
    for device in ("cpu", "cuda"):
        common = ["--checkpoint", trained_run, "--device", device, "--workers", "0", "--json"]
        finished = segtrain("eval", *common, "--tta", "scales")
        assert finished.code == 0, finished.err
        found[device] = json.loads(finished.out)["figures"]

    for key in ("person_iou", "mean_iou", "pixel_accuracy"):
        assert found["cuda"][key] == pytest.approx(found["cpu"][key], abs=2e-3)


# --- Processes of their own ---------------------------------------------------------------------


@contextmanager
def endless_training(data: Path, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """With loader processes that pin memory, in a session of its own; past its second epoch."""
    command = ["train", "--data", str(data), *NETWORK, "--workers", "2", "--epochs", "9999"]
    command += ["--device", "cuda", "--precision", "bf16", "--name", "toy"]
    process = subprocess.Popen(
        [sys.executable, "-m", "segtrain", *command],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            said.append(line)
            if line.startswith("epoch 2/"):
                break
        assert process.poll() is None, "".join(said)
        yield process
    finally:
        for pid in session_members(process.pid):
            os.kill(pid, signal.SIGKILL)
        process.wait()


def test_a_signal_saves_and_the_run_goes_on(
    segtrain: Command, toy_coco: Path, tmp_path: Path
) -> None:
    with endless_training(toy_coco, tmp_path) as process:
        process.terminate()
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 143, out
        assert session_members(process.pid) == []
    stopped = load_checkpoint(LAST)

    finished = segtrain(
        *("train", "--data", toy_coco, "--resume", "runs/toy", "--workers", "0"),
        *("--epochs", str(stopped.epoch + 1)),
    )

    assert finished.code == 0, finished.err
    assert load_checkpoint(LAST).global_step > stopped.global_step


def test_a_dead_loader_process_ends_the_training_with_a_word(
    toy_coco: Path, tmp_path: Path
) -> None:
    with endless_training(toy_coco, tmp_path) as process:
        children = [pid for pid in session_members(process.pid) if pid != process.pid]
        assert len(children) >= 2
        os.kill(children[-1], signal.SIGKILL)
        out, _ = process.communicate(timeout=120)

    assert process.returncode == 5, out
    assert out.count("error:") == 1
    assert "Traceback" not in out
    load_checkpoint(LAST)
